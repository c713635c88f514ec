// A stock kafkajs client over TLS: it produces a record and reads it.
'use strict'

const fs = require('node:fs')
const { Kafka, logLevel } = require('kafkajs')

const { broker, topic, value, ca, cert, key, user, password } = JSON.parse(process.argv[2])
const ssl = { ca: [fs.readFileSync(ca)] } // rejectUnauthorized is its default
if (cert) {
  ssl.cert = fs.readFileSync(cert)
  ssl.key = fs.readFileSync(key)
}
const sasl = user ? { mechanism: 'scram-sha-512', username: user, password } : undefined
const kafka = new Kafka({ brokers: [broker], logLevel: logLevel.ERROR, ssl, sasl })

async function run () {
  const producer = kafka.producer()
  await producer.connect()
  await producer.send({ topic, messages: [{ value }] })
  await producer.disconnect()
  const consumer = kafka.consumer({ groupId: 'kafkajs' })
  await consumer.connect()
  await consumer.subscribe({ topic, fromBeginning: true })
  await new Promise((resolve, reject) => {
    consumer.on(consumer.events.CRASH, ({ payload }) => reject(payload.error))
    consumer.run({ eachMessage: async ({ message }) => { if (message.value.toString() === value) resolve() } })
  })
  await consumer.disconnect()
}

run().catch(error => {
  console.error(error)
  process.exit(1)
})
