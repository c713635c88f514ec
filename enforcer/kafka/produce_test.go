package kafka

import "testing"

// Brokers answer in any order, and name a partition once.
func TestEveryPartitionOfAProduceIsFound(t *testing.T) {
	for _, n := range []int{3, 1000} {
		p := produced{}
		for i := range n {
			p.parts = append(p.parts, producedPart{topic: &topic{name: "orders"}, partition: int32(i)})
		}
		for i := n - 1; i >= 0; i-- {
			part := p.find([]byte("orders"), int32(i))
			if part != &p.parts[i] {
				t.Fatalf("of %d partitions, %d is not found", n, i)
			}
			part.answered = true
			if p.find([]byte("orders"), int32(i)) != nil || p.find([]byte("others"), int32(i)) != nil {
				t.Fatalf("of %d partitions, %d is found again, or as another topic's", n, i)
			}
		}
	}
}
