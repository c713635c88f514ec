package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"klamm/test/kafka"
	"klamm/test/kubernetes"
)

const (
	clientPods = "client" // what the names of pods with rights begin with
	metrics    = kubernetes.NodeIP + ":9464"
)

const klammConfig = `node: {name: %s, cgroup: %q}
intercept: {ports: [%d], nri: /run/nri/nri.sock, firewall: %t}
clusters: [{name: main, bootstrap: [%q]}]
identities:
  - {name: clients, spiffe-id: "spiffe://k8s.test/client", namespace: %s, pod: "%s-*"}
policies: [policy.yaml]
audit: {file: audit.jsonl}
metrics: {listen: %q}
`

const policy = `apiVersion: klamm/v1
rules:
  - name: clients use orders
    principals: ["spiffe://k8s.test/client"]
    allow:
      - {topic: orders, operations: [Read, Write, Describe]}
      - {group: "orders-*", operations: [Read, Describe]}
`

// mutation is the rule that MUTATE=1 adds.
const mutation = `  - name: a mistake
    principals: ["spiffe://k8s.test/client"]
    allow:
      - {topic: payouts, operations: [Read, Write, Describe]}
`

// configureKlamm writes the node's configuration.
func (r *rig) configureKlamm() error {
	rules, firewall := policy, true
	if os.Getenv("MUTATE") == "1" {
		rules, firewall = policy+mutation, false
	}
	text := fmt.Sprintf(klammConfig, kubernetes.Name, r.node.Cgroup, kafka.PlaintextPort, firewall, r.broker(),
		kubernetes.Namespace, clientPods, metrics)
	for file, text := range map[string]string{"klamm.yaml": text, "policy.yaml": rules} {
		if err := os.WriteFile(filepath.Join(r.node.Dir, file), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// startKlamm starts klamm as a DaemonSet does: in the network, mount and process namespaces of the node.
func (r *rig) startKlamm(ctx context.Context) error {
	binary, err := filepath.Abs("bin/klamm")
	if err != nil {
		return err
	}
	if err := r.node.Start("klamm", "klamm", binary+" node -c {dir}/klamm.yaml"); err != nil {
		return fmt.Errorf("%w: run make build", err)
	}
	return kubernetes.Await(ctx, "klamm to be ready", func() (bool, error) {
		answer, err := http.Get("http://" + metrics + "/readyz")
		if err != nil {
			return false, r.node.Alive("klamm")
		}
		defer func() { _ = answer.Body.Close() }()
		return answer.StatusCode == http.StatusOK, r.node.Alive("klamm")
	})
}

// status is what the checks read of klamm status.
type status struct {
	Namespaces []json.RawMessage `json:"namespaces"` // in which it listens
	Counters   map[string]uint64 `json:"counters"`
}

func (r *rig) status(ctx context.Context) (status, error) {
	var s status
	cmd := exec.CommandContext(ctx, "bin/klamm", "status", "-o", "json", "-c", filepath.Join(r.node.Dir, "klamm.yaml"))
	out, err := cmd.Output()
	if err != nil {
		return s, fmt.Errorf("klamm status: %w\n%s", err, out)
	}
	return s, json.Unmarshal(out, &s)
}

// auditLine is what the checks read of a line of the audit.
type auditLine struct {
	Event     string `json:"event"`
	Verdict   string `json:"verdict"`
	Resource  string `json:"resource"`
	SPIFFE    string `json:"spiffe_id"`
	Pod       string `json:"pod"`
	Namespace string `json:"pod_namespace"`
	UID       string `json:"pod_uid"`
	ID        string `json:"container_id"`
	Container string `json:"container"`
}

// audit returns the lines of a pod, by its uid.
func (r *rig) audit(uid string) ([]auditLine, error) {
	file, err := os.Open(filepath.Join(r.node.Dir, "audit.jsonl"))
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	var lines []auditLine
	scanner := bufio.NewScanner(file)
	for scanner.Scan() {
		if !strings.Contains(scanner.Text(), uid) {
			continue
		}
		var line auditLine
		if err := json.Unmarshal(scanner.Bytes(), &line); err != nil {
			return nil, fmt.Errorf("read %s: %w", file.Name(), err)
		}
		lines = append(lines, line)
	}
	return lines, scanner.Err()
}
