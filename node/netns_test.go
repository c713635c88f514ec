package node

import (
	"testing"
	"time"
)

// newTestNetns makes a network namespace, with lo up, that lasts as long as the test.
func newTestNetns(t testing.TB) *netns {
	t.Helper()
	n, err := makeNetns()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

// until waits for a condition.
func until(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(redirectPatience); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %v in vain for %s", redirectPatience, what)
		}
	}
}
