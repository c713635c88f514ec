// kafkajs as a TLS client: it produces a text and consumes it.
const fs = require("fs");
const { Kafka, logLevel } = require("kafkajs");

const o = JSON.parse(process.argv[2]);
const ssl = { ca: [fs.readFileSync(o.CA)] };
if (o.Certificate) {
  Object.assign(ssl, { cert: fs.readFileSync(o.Certificate), key: fs.readFileSync(o.Key) });
}
const sasl = o.User && { mechanism: o.Mechanism.toLowerCase(), username: o.User, password: o.Secret };
const kafka = new Kafka({ brokers: [o.Broker], ssl, sasl: sasl || undefined, logLevel: logLevel.ERROR, retry: { retries: 2 } });

async function main() {
  const producer = kafka.producer();
  await producer.connect();
  await producer.send({ topic: o.Topic, messages: [{ value: o.Text }] });
  await producer.disconnect();
  const consumer = kafka.consumer({ groupId: "orders-" + process.pid });
  await consumer.connect();
  await consumer.subscribe({ topics: [o.Topic], fromBeginning: true });
  const found = new Promise((resolve) => {
    consumer.run({ eachMessage: async ({ message }) => message.value.toString() === o.Text && resolve() });
  });
  await found;
  await consumer.disconnect();
  console.log(o.Text);
}

setTimeout(() => { console.error("it was not consumed"); process.exit(1); }, 40000).unref();
main().catch((e) => { console.error(e); process.exit(1); });
