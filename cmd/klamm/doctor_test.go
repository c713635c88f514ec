package main

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"klamm/node"
	"klamm/test/kafka"
	"klamm/test/spire/fake"
	"klamm/test/stage"
)

// findings runs klamm doctor as data.
func findings(t *testing.T, args ...string) (code int, all map[string]finding, errOut string) {
	t.Helper()
	code, out, errOut := inProcess(t, append([]string{"doctor", "-o", "json"}, args...)...)
	return code, parseFindings(t, out), errOut
}

func parseFindings(t *testing.T, out []byte) map[string]finding {
	t.Helper()
	var list []finding
	if err := json.Unmarshal(out, &list); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	all := map[string]finding{}
	for _, f := range list {
		all[f.Check] = f
	}
	return all
}

func TestTheDoctorFindsThisHostFitAndLeavesNothing(t *testing.T) {
	root, err := node.Cgroup2Mount()
	if err != nil {
		t.Fatal(err)
	}
	code, all, errOut := findings(t)
	if code != 0 || len(all) != len(hostChecks) || errOut != "" {
		t.Errorf("exit code %d, %d findings, stderr\n%s", code, len(all), errOut)
	}
	for _, f := range all {
		if !f.OK || f.Detail == "" || f.Remedy != "" {
			t.Errorf("%+v", f)
		}
	}
	if left, err := filepath.Glob(filepath.Join(root, "klamm-doctor-*")); err != nil || len(left) > 0 {
		t.Errorf("cgroups are left: %v, %v", left, err)
	}
}

func TestTheDoctorMountsNothing(t *testing.T) {
	cmd, out, errOut := command(t, kafka.Place{}, withoutBPFFS+"=1", "doctor", "-o", "json")
	if code := exitCode(t, cmd); code != 0 {
		t.Errorf("exit code %d, stderr\n%s", code, errOut)
	}
	if f := parseFindings(t, []byte(out.String()))["bpffs"]; !f.OK || !strings.HasPrefix(f.Detail, "not mounted") {
		t.Errorf("%+v", f)
	}
}

func TestTheDoctorSaysWhatToDo(t *testing.T) {
	for name, c := range map[string]struct {
		place  kafka.Place
		env    string
		failed []string
	}{
		"without privilege":        {kafka.Place{UID: 65534, GID: 65534}, "", []string{"privileges", "eBPF programs"}},
		"on a kernel without eBPF": {kafka.Place{}, withoutBPF + "=1", []string{"kernel features", "eBPF programs"}},
	} {
		t.Run(name, func(t *testing.T) {
			cmd, out, errOut := command(t, c.place, c.env, "doctor", "-o", "json")
			code, said := exitCode(t, cmd), errOut.String()
			if code != 1 || !strings.HasSuffix(said, "checks failed\n") || strings.Count(said, "\n") != 1 {
				t.Errorf("exit code %d, stderr\n%s", code, said)
			}
			all := parseFindings(t, []byte(out.String()))
			for _, check := range c.failed {
				if f := all[check]; f.OK || f.Detail == "" || f.Remedy == "" {
					t.Errorf("%+v", f)
				}
			}
		})
	}
}

func TestTheDoctorChecksTheConfigurationAndItsClusters(t *testing.T) {
	broker, down := stage.StartBroker(t), stage.DownAddr(t)
	token := filepath.Join(t.TempDir(), "token")
	stage.WriteFile(t, token, "token\n")
	unknown := stage.Config{"clusters": stage.Clusters("broker.invalid:9092")}
	agent, err := fake.New(fake.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := agent.Stop(); err != nil {
			t.Error(err)
		}
	})
	spire := func(api, socket string) stage.Config {
		return stage.Config{"spire": fmt.Sprintf("{api: %s, socket: %s, workload-api: %s}", api, socket, agent.WorkloadAPI())}
	}
	for name, c := range map[string]struct {
		broker string
		config stage.Config
		failed string // check
		detail string
	}{
		"a cluster that answers":     {broker.Addr(), nil, "", ""},
		"a cluster that is down":     {down, nil, "cluster main", "connection refused"},
		"a policy that is not there": {broker.Addr(), stage.Config{"policies": "[gone.yaml]"}, "policies", "no such file"},
		"an issuer that is down": {broker.Addr(),
			stage.Config{"oidc": "[{issuer: 'http://" + down + "', audiences: [kafka]}]"},
			"issuer http://" + down, "connection refused"},
		"an API server that is down": {broker.Addr(), stage.Config{"kubernetes": "{review: {server: 'https://" + down +
			"', token-file: '" + token + "'}}"}, "token reviews", "connection refused"},
		"a name nobody knows":        {broker.Addr(), unknown, "cluster main", "cannot resolve"},
		"an agent that serves":       {broker.Addr(), spire("broker", agent.Socket("broker")), "", ""},
		"an agent that is not there": {broker.Addr(), spire("broker", "/gone.sock"), "SPIRE agent", "start the SPIRE agent"},
		"an agent's other socket": {broker.Addr(), spire("delegated", agent.WorkloadAPI()), "SPIRE agent",
			"admin_socket_path"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			stage.Load(t, dir, stage.NewCgroup(t), c.broker, stage.OrdersOnly, c.config)
			code, all, errOut := findings(t, "-c", filepath.Join(dir, "klamm.yaml"), "--wait", "2s")
			if want := map[bool]int{true: 0, false: 1}[c.failed == ""]; code != want {
				t.Errorf("exit code %d, stderr\n%s", code, errOut)
			}
			for check, f := range all {
				if f.OK == (check == c.failed) || !strings.Contains(f.Detail, c.detail) && !f.OK || !f.OK && f.Remedy == "" {
					t.Errorf("%+v", f)
				}
			}
		})
	}
	bad := filepath.Join(t.TempDir(), "klamm.yaml")
	stage.WriteFile(t, bad, "clusters: []\n")
	code, all, _ := findings(t, "-c", bad)
	if f := all["configuration"]; code != 1 || !strings.Contains(f.Detail, bad+":1:11: no cluster") {
		t.Errorf("exit code %d, %+v", code, f)
	}
}
