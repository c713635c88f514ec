package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"klamm/test/kafka"
)

const (
	clientPods = "client" // what the names of pods with rights begin with
	metrics    = nodeIP + ":9464"
)

const klammConfig = `node: {name: %s, cgroup: %q}
intercept: {ports: [%d], nri: %q, firewall: %t}
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
	rules, nri, firewall := policy, "/run/nri/nri.sock", true
	if os.Getenv("MUTATE") == "1" {
		rules, nri, firewall = policy+mutation, "", false
	}
	text := fmt.Sprintf(klammConfig, nodeName, r.cgroup, kafka.PlaintextPort, nri, firewall, r.broker(), namespace,
		clientPods, metrics)
	for file, text := range map[string]string{"klamm.yaml": text, "policy.yaml": rules} {
		if err := os.WriteFile(filepath.Join(r.dir, file), []byte(text), 0o600); err != nil {
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
	if err := r.start("klamm", "klamm", binary+" node -c {dir}/klamm.yaml"); err != nil {
		return fmt.Errorf("%w: run make build", err)
	}
	return await(ctx, "klamm to be ready", func() (bool, error) {
		answer, err := http.Get("http://" + metrics + "/readyz")
		if err != nil {
			return false, r.alive("klamm")
		}
		defer func() { _ = answer.Body.Close() }()
		return answer.StatusCode == http.StatusOK, r.alive("klamm")
	})
}

// metric returns the value of a metric of klamm, 0 when it has none.
func (r *rig) metric(ctx context.Context, name string) (float64, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+metrics+"/metrics", http.NoBody)
	if err != nil {
		return 0, err
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return 0, err
	}
	defer func() { _ = answer.Body.Close() }()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		return 0, err
	}
	found := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + ` (.*)$`).FindSubmatch(text)
	if found == nil {
		return 0, nil
	}
	return strconv.ParseFloat(string(found[1]), 64)
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
	Container string `json:"container_id"`
}

// audit returns the lines of a pod, by its uid.
func (r *rig) audit(uid string) ([]auditLine, error) {
	file, err := os.Open(filepath.Join(r.dir, "audit.jsonl"))
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
