"""A stock confluent-kafka client: produce lines, consume them in a group, list topics."""

import sys

from confluent_kafka import Consumer, KafkaException, Producer
from confluent_kafka.admin import AdminClient


def produce(brokers, topic):
    """One record per line of the standard input."""
    failed = []

    def delivered(error, _):
        if error is not None:
            failed.append(error)

    producer = Producer({"bootstrap.servers": brokers})
    for line in sys.stdin:
        producer.produce(topic, line.rstrip("\n").encode(), on_delivery=delivered)
        producer.poll(0)
    producer.flush()
    if failed:
        raise KafkaException(failed[0])


def consume(brokers, topic, group, count):
    """Prints the values of count records."""
    consumer = Consumer({"bootstrap.servers": brokers, "group.id": group, "auto.offset.reset": "earliest"})
    consumer.subscribe([topic])
    left = int(count)
    try:
        while left:
            message = consumer.poll(1)
            if message is None:
                continue
            if message.error():
                raise KafkaException(message.error())
            print(message.value().decode(), flush=True)
            left -= 1
    finally:
        consumer.close()


def list_topics(brokers):
    """Prints the names of all topics."""
    metadata = AdminClient({"bootstrap.servers": brokers}).list_topics(timeout=20)
    print("\n".join(metadata.topics))


if __name__ == "__main__":
    try:
        {"produce": produce, "consume": consume, "list": list_topics}[sys.argv[1]](*sys.argv[2:])
    except KafkaException as error:
        sys.exit(f"{error.args[0].name()}: {error}")
