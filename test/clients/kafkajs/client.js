// A stock kafkajs client: produce lines, consume them in a group, list topics.
'use strict'

const readline = require('node:readline')
const { Kafka, logLevel } = require('kafkajs')

const [operation, brokers, topic, group, count] = process.argv.slice(2)
const kafka = new Kafka({ brokers: brokers.split(','), logLevel: logLevel.ERROR })

const operations = {
  // produce BROKERS TOPIC: one record per line of the standard input.
  async produce () {
    const producer = kafka.producer()
    await producer.connect()
    for await (const value of readline.createInterface({ input: process.stdin })) {
      await producer.send({ topic, messages: [{ value }] })
    }
    await producer.disconnect()
  },

  // consume BROKERS TOPIC GROUP N: prints the values of N records.
  async consume () {
    const consumer = kafka.consumer({ groupId: group })
    let left = Number(count)
    const done = new Promise((resolve, reject) => {
      consumer.on(consumer.events.CRASH, ({ payload }) => reject(payload.error))
      consumer.connect()
        .then(() => consumer.subscribe({ topic, fromBeginning: true }))
        .then(() => consumer.run({
          eachMessage: async ({ message }) => {
            console.log(message.value.toString())
            if (--left === 0) resolve()
          }
        }))
        .catch(reject)
    })
    await done.finally(() => consumer.disconnect())
  },

  // list BROKERS: prints the names of all topics.
  async list () {
    const admin = kafka.admin()
    await admin.connect()
    console.log((await admin.listTopics()).join('\n'))
    await admin.disconnect()
  }
}

operations[operation]().catch(error => {
  console.error(`${error.name}: ${error.message} ${error.type ?? error.cause?.type ?? ''}`)
  process.exit(1)
})
