"""confluent-kafka as a TLS client: it produces a text and consumes it."""
import json
import sys
import time

from confluent_kafka import Consumer, Producer, TopicPartition

o = json.loads(sys.argv[1])
conf = {"bootstrap.servers": o["Broker"], "security.protocol": "ssl", "ssl.ca.location": o["CA"],
        "ssl.endpoint.identification.algorithm": "https"}
if o["User"]:
    conf |= {"security.protocol": "sasl_ssl", "sasl.mechanism": o["Mechanism"], "sasl.username": o["User"],
             "sasl.password": o["Secret"]}
if o["Certificate"]:
    conf |= {"ssl.certificate.location": o["Certificate"], "ssl.key.location": o["Key"]}
failures = []
producer = Producer(conf | {"message.timeout.ms": 20000})
producer.produce(o["Topic"], o["Text"], on_delivery=lambda failed, _: failures.append(failed) if failed else None)
if producer.flush(25) or failures:
    sys.exit(f"produce: {failures}")
consumer = Consumer(conf | {"group.id": "orders-tls", "enable.auto.commit": False})
consumer.assign([TopicPartition(o["Topic"], p, 0) for p in range(3)])
deadline = time.monotonic() + 20
while time.monotonic() < deadline:
    message = consumer.poll(1)
    if message and not message.error() and message.value().decode() == o["Text"]:
        print(o["Text"])
        sys.exit()
sys.exit("it was not consumed")
