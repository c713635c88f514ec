package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"klamm/test/host"
	"klamm/test/kafka"
)

func TestMain(m *testing.M) {
	host.BeDialer()
	os.Exit(m.Run())
}

// A lean pass: every scenario at its oldest and its newest version, and the first seed, on the newest Kafka.
func TestAnswersAreThoseOfABrokerWithTheSameACLs(t *testing.T) {
	s := newSuite()
	s.lean, s.mutate = true, os.Getenv("MUTATE") == "1"
	if err := s.read(func(string) bool { return true }); err != nil {
		t.Fatal(err)
	}
	s.seeds = s.seeds[:1]
	s.klamm = filepath.Join(t.TempDir(), "klamm")
	if err := buildKlamm(t.Context(), s.klamm); err != nil {
		t.Fatal(err)
	}
	if err := s.play(t.Context(), kafka.Newest); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d passed, %d failed in %s", s.passed, s.failed, time.Since(s.began).Round(time.Second))
	if s.failed > 0 || s.passed == 0 {
		t.Fail()
	}
}
