# Every target works alone on a fresh Debian 12 or Ubuntu 24.04 machine, as root, with Go, make and git:
# scripts/setup installs what a target needs and the machine lacks.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export KLAMM_CACHE ?= $(HOME)/.cache/klamm
export PATH := $(KLAMM_CACHE)/bin:$(PATH)

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
setup := scripts/setup
objects := $(wildcard bpf/*_bpfel*)

.PHONY: help build generate test lint demo verify-clients verify-fidelity verify-kgo verify-librdkafka verify-interception verify-kernels verify-k8s verify-identity fuzz bench clean

help: ## this list
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/\1\t\2/p' Makefile | expand -t 22

build: ## bin/klamm, a static binary
	$(setup) go
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/klamm ./cmd/klamm

generate: ## the eBPF objects from their C sources
	$(setup) go clang
	go generate ./bpf

# What takes neither SPIRE nor Kubernetes is in test: their APIs are fakes there, and pass the same cases as the real
# ones in verify-identity.
test: ## unit tests under the race detector, real kernel hooks, a lean pass over real Kafka; needs root
	$(setup) go gcc kafka runc oidc-issuer
	go vet ./...
	go test -race -timeout 15m $$(go list ./... | grep -v /test/bypass$$)
	go test -timeout 15m ./test/bypass # hundreds of processes, which the race detector makes slow
	go test -run SteadyState ./enforcer/kafka # counts allocations, which the race detector changes

lint: ## golangci-lint, and that the committed eBPF objects are what their sources give
	$(setup) lint clang
	CGO_ENABLED=0 golangci-lint run ./...
	scripts/same-objects $(objects)

demo: build ## the product on this machine in a minute; needs root
	bin/klamm demo

verify-clients: build ## foreign Kafka clients, librdkafka's own tests and franz-go's of share groups; needs root
	$(setup) kafka librdkafka
	scripts/total 'go run ./test/clients' 'go run ./test/librdkafka' \
		'go run ./test/kgo -brokers kafka -run ^TestShareGroup'

verify-fidelity: build ## as a broker with ACLs answers, and with what is large, slow or lasts long; needs root
	$(setup) kafka
	scripts/total 'go run ./test/differential' 'go run ./test/large'

verify-kgo: build ## franz-go's own integration tests, direct and through the node; needs root
	$(setup) kafka
	go run ./test/kgo

verify-librdkafka: build ## librdkafka's own tests, direct and through the node; needs root; builds them the first time
	$(setup) kafka librdkafka
	go run ./test/librdkafka

verify-interception: build ## ways around, restarts and crashes, fail modes, pods: against real brokers; needs root
	$(setup) kafka kcat kubernetes
	go run ./test/interception

verify-k8s: build ## pods of a real Kubernetes node and a real Kafka; needs root; builds Kubernetes the first time
	$(setup) kafka kcat kubernetes
	go run ./test/k8s

verify-identity: build ## who is who: real SPIRE, OIDC issuer, Kubernetes node and Kafka; needs root
	$(setup) spire kafka kcat node-clients python-clients oidc-issuer kubernetes
	go run ./test/identity

verify-kernels: ## other kernels booted in virtual machines, and the systemd unit in one of them; needs root
	$(setup) go qemu kernels systemd-guest
	go run ./test/kernels

fuzz: ## every fuzz target for FUZZTIME (30s); FUZZ chooses some by a regular expression
	$(setup) go
	go run ./test/fuzz

bench: build ## direct, bare relay, hashing relay and klamm, interleaved; needs root
	go run ./bench

clean: ## removes what build made
	rm -rf bin
