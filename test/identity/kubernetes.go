package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/test/ca"
	"klamm/test/kafka"
	"klamm/test/kubernetes"
	"klamm/test/spire"
	"klamm/test/stage"
)

const (
	serviceAccounts = "/api/v1/namespaces/" + kubernetes.Namespace + "/serviceaccounts"

	// watchImage has busybox and this program.
	watchImage = "klamm.test/watch:1"
	metrics    = kubernetes.NodeIP + ":9464"
	// reviewBound is how long a deleted pod's token may count where the API server reviews it.
	reviewBound = 15 * time.Second
)

// kubernetesSuite runs the checks that are made inside, next to a Kubernetes node.
func kubernetesSuite(ctx context.Context, tell tell) {
	read, write := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		dir, err := kubernetes.Enter(ctx, watchImages(ctx), write, "inside", "mutation="+mutation(ctx))
		if err != nil {
			err = fmt.Errorf("%w: logs are in %s", err, dir)
		}
		ended <- errors.Join(err, write.Close())
	}()
	var failed error
	for lines := bufio.NewScanner(read); lines.Scan(); {
		var r insideResult
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			fmt.Println(lines.Text())
			continue
		}
		if r.Error != "" {
			failed = errors.New(r.Error)
			tell(r.Name, r.Measured, failed)
			continue
		}
		tell(r.Name, r.Measured, nil)
	}
	if err := <-ended; err != nil && failed == nil {
		tell("it runs to its end", "", err)
	}
}

// insideResult is a result as it comes from inside: one JSON object a line.
type insideResult struct{ Name, Measured, Error string }

func watchImages(ctx context.Context) func(dir string) ([]*kubernetes.Image, error) {
	return func(dir string) ([]*kubernetes.Image, error) {
		program := filepath.Join(dir, "identity")
		if err := kubernetes.Build(ctx, "test/identity", program); err != nil {
			return nil, err
		}
		image, err := kubernetes.ShellImage(watchImage, "busybox")
		if err != nil {
			return nil, err
		}
		image.Files["bin/identity"] = program
		return []*kubernetes.Image{image}, nil
	}
}

func beInside(args []string) int {
	ctx := context.Background()
	if rule := strings.TrimPrefix(args[0], "mutation="); rule != "" {
		ctx = context.WithValue(ctx, mutationKey{}, rule)
	}
	failed := false
	tell := func(name, measured string, err error) {
		r := insideResult{Name: name, Measured: measured}
		if err != nil {
			r.Error, failed = err.Error(), true
		}
		_ = json.NewEncoder(os.Stdout).Encode(r) // who started this program is gone
	}
	k, err := newCluster(ctx, args[1], args[2])
	if err != nil {
		tell("the node, SPIRE and Kafka start", "", err)
		return 1
	}
	k.checks(ctx, tell)
	if err := k.close(); err != nil {
		tell("the node, SPIRE and Kafka end", "", err)
	}
	if failed {
		return 1
	}
	return 0
}

// k8s is a Kubernetes node with SPIRE on it, and brokers on another host.
type k8s struct {
	*world    // its directory is the node's
	node      *kubernetes.Node
	spire     *spire.SPIRE
	authority *ca.Authority
	cluster   *kafka.Cluster
	binary    string
	entries   map[string]string // by SPIFFE ID
}

// attestor is the agent's plugin: it asks the kubelet, as a user that may.
const attestor = `WorkloadAttestor "k8s" {
        plugin_data {
            node_name = "` + kubernetes.NodeIP + `"
            kubelet_ca_path = "%[1]s/ca.crt"
            certificate_path = "%[1]s/spire.crt"
            private_key_path = "%[1]s/spire.key"
            experimental {
                broker {
                    access_policy = "permissive"
                    brokers = [{ id = "` + spire.Node + `" }]
                }
            }
        }
    }`

// newCluster starts it all in the directory and the cgroup that kubernetes.Enter gave.
func newCluster(ctx context.Context, dir, cgroup string) (_ *k8s, err error) {
	k := &k8s{world: &world{dir: dir}, entries: map[string]string{}}
	if k.binary, err = klammBinary(ctx); err != nil {
		return nil, err
	}
	if k.authority, err = ca.New("brokers"); err != nil {
		return nil, err
	}
	if k.node, err = kubernetes.New(dir, cgroup); err != nil {
		return nil, err
	}
	if err := k.node.Run(ctx); err != nil {
		return nil, err
	}
	if err := errors.Join(k.grant(ctx), os.Mkdir(k.file("spire"), 0o755)); err != nil {
		return nil, err
	}
	k.spire, err = spire.New(ctx, spire.Options{Dir: k.file("spire"), SyncInterval: syncInterval,
		CacheInterval: syncInterval, NodeSelectors: []string{"unix:uid:0", "unix:path:" + k.binary},
		AgentPlugins: fmt.Sprintf(attestor, dir)})
	if err != nil {
		return nil, err
	}
	k.onClose(k.spire.Stop)
	for account, id := range map[string]string{"orders": ordersID, "billing": billingID} {
		e := spire.Entry{ID: id, DNSNames: []string{account + ".shop"},
			Selectors: []string{"k8s:ns:" + kubernetes.Namespace, "k8s:sa:" + account}}
		if k.entries[id], err = k.spire.Register(ctx, e); err != nil {
			return nil, err
		}
	}
	bundle, err := k.spire.Bundle(ctx)
	if err != nil {
		return nil, err
	}
	clients, err := certificates(bundle)
	if err != nil {
		return nil, err
	}
	k.cluster, err = k.startKafka(ctx, kafka.Options{Hosts: []string{kubernetes.BrokerIP},
		SuperUsers: []string{"User:klamm", "User:orders.shop", "User:billing.shop"},
		TLS: &kafka.TLS{CA: k.authority, Clients: append(clients, k.authority.Certificate), ClientAuth: "required",
			Mapping: mapping}})
	return k, err
}

func (k *k8s) close() error {
	var errs []error
	for _, end := range slices.Backward(k.closers) {
		errs = append(errs, end())
	}
	return errors.Join(errs...)
}

// grant makes the accounts and what they may: SPIRE's agent asks the kubelet, klamm has tokens reviewed.
func (k *k8s) grant(ctx context.Context) error {
	err := errors.Join(k.node.Authority.Client("spire", "spire-agent", ""), k.node.Authority.Client("klamm", "klamm", ""))
	const bindings = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"
	for _, made := range []struct{ path, yaml string }{
		{"/apis/rbac.authorization.k8s.io/v1/clusterroles", `{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRole,
  metadata: {name: spire-agent}, rules: [{apiGroups: [""], resources: [nodes/proxy], verbs: [get]}]}`},
		{bindings, binding("spire-agent", "spire-agent")},
		{bindings, binding("klamm", "system:auth-delegator")},
		{serviceAccounts, "{apiVersion: v1, kind: ServiceAccount, metadata: {name: orders}}"},
		{serviceAccounts, "{apiVersion: v1, kind: ServiceAccount, metadata: {name: billing}}"},
	} {
		_, cerr := k.node.API.Call(ctx, http.MethodPost, made.path, made.yaml)
		err = errors.Join(err, cerr)
	}
	if err != nil {
		return err
	}
	keys, err := k.node.API.Call(ctx, http.MethodGet, "/openid/v1/jwks", "")
	return errors.Join(err, os.WriteFile(k.file("jwks.json"), keys, 0o600))
}

func binding(user, role string) string {
	return fmt.Sprintf(`{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRoleBinding, metadata: {name: %q},
  subjects: [{kind: User, name: %s, apiGroup: rbac.authorization.k8s.io}],
  roleRef: {kind: ClusterRole, name: %q, apiGroup: rbac.authorization.k8s.io}}`,
		user+"-"+strings.ReplaceAll(role, ":", "-"), user, role)
}

// ofAccounts lets service accounts use their topics, by SPIFFE ID or by token.
const ofAccounts = `apiVersion: klamm/v1
rules:
  - {name: orders, principals: ["` + ordersID + `"], allow: [{topic: orders, operations: [Read, Write, Describe]}]}
  - {name: billing, principals: ["` + billingID + `"], allow: [{topic: billing, operations: [Read, Write, Describe]}]}
  - name: orders by token
    when: claims.sub == "system:serviceaccount:shop:orders"
    allow: [{topic: orders, operations: [Read, Write, Describe]}]
  - name: billing by token
    when: claims.sub == "system:serviceaccount:shop:billing"
    allow: [{topic: billing, operations: [Read, Write, Describe]}]
`

// with runs klamm on the node with these sections while run runs.
func (k *k8s) with(ctx context.Context, name, more string, run func(n *node)) error {
	root, err := k.written("brokers-ca.pem", k.authority.PEM())
	if err != nil {
		return err
	}
	own, err := k.authority.Issue(ca.Leaf{Subject: commonName("klamm")})
	if err != nil {
		return err
	}
	n := &node{world: k.world, dir: k.file(name), binary: k.binary, metrics: metrics}
	text := fmt.Sprintf(`node: {name: node1, cgroup: %q, pins: "", socket: ""}
intercept: {ports: [%d, %d], nri: /run/nri/nri.sock, firewall: false}
policies: [policy.yaml]
audit: {file: audit.jsonl}
metrics: {listen: %q}
%s`, k.node.Cgroup, kafka.PlaintextPort, kafka.TLSPort, metrics,
		strings.NewReplacer("{plain}", k.cluster.Addrs()[0], "{tls}", k.cluster.TLSAddrs()[0], "{ca}", root,
			"{cert}", filepath.Join(n.dir, "klamm.crt"), "{key}", filepath.Join(n.dir, "klamm.key"),
			"{dir}", k.dir).Replace(more))
	err = errors.Join(os.Mkdir(n.dir, 0o755), os.WriteFile(n.file("klamm.yaml"), []byte(text), 0o600),
		os.WriteFile(n.file("policy.yaml"), []byte(ofAccounts), 0o600))
	if err == nil {
		err = ca.Write(own, n.file("klamm.crt"), n.file("klamm.key"))
	}
	if err != nil {
		return err
	}
	if err := k.node.Start("klamm", "klamm", k.binary+" node -c "+n.file("klamm.yaml")); err != nil {
		return fmt.Errorf("%w: run make build", err)
	}
	err = kubernetes.Await(ctx, "klamm to be ready", func() (bool, error) {
		answer, err := http.Get("http://" + metrics + "/readyz")
		if err != nil {
			return false, k.node.Alive("klamm")
		}
		defer func() { _ = answer.Body.Close() }()
		return answer.StatusCode == http.StatusOK, k.node.Alive("klamm")
	})
	if err != nil {
		return err
	}
	run(n)
	return k.node.Stop("klamm", syscall.SIGTERM)
}

const (
	plainCluster = "clusters:\n  - {name: main, bootstrap: [\"{plain}\"]}\n"
	mtlsCluster  = "  - {name: mtls, bootstrap: [\"{tls}\"], tls: {ca: {ca}, cert: {cert}, key: {key}}," +
		" upstream: {tls: {ca: {ca}, certificate: workload}}}\n"
	review  = `review: {server: "` + kubernetes.URL + `", ca: {dir}/ca.crt, cert: {dir}/klamm.crt, key: {dir}/klamm.key}`
	issuers = `oidc: [{issuer: "` + kubernetes.URL + `", jwks: {file: {dir}/jwks.json}}]` + "\n"
)

func (k *k8s) checks(ctx context.Context, tell tell) {
	const own = "pods have the identities of their service accounts, and the audit says so"
	for _, api := range []string{"broker", "delegated"} {
		section := fmt.Sprintf("spire: {api: %s, socket: %q, workload-api: %q}\n", api, k.spire.Socket(api),
			k.spire.WorkloadAPI())
		err := k.with(ctx, api, plainCluster+mtlsCluster+section, func(n *node) {
			tell := func(name, measured string, err error) { tell("SPIRE, "+api+" API: "+name, measured, err) }
			runAll(ctx, tell, []check{
				{own, func(ctx context.Context) (string, error) {
					return k.eachPodHasItsOwn(ctx, n, func(account string) string { return trustDomain + "ns/shop/sa/" + account })
				}},
				{"a pod of another service account has none", func(ctx context.Context) (string, error) {
					return "", k.noRights(ctx, "default")
				}},
				{"brokers see the principal of each pod's X509-SVID", k.podsAreShown},
				{"a deleted pod's rights end", func(ctx context.Context) (string, error) { return k.deletedPodEnds(ctx, n) }},
			})
		})
		if err != nil {
			tell("klamm runs with SPIRE's "+api+" API", "", err)
		}
	}
	for name, section := range map[string]string{
		"TokenReview": "kubernetes: {" + review + "}\n",
		"offline":     issuers + `kubernetes: {issuer: "` + kubernetes.URL + `"}` + "\n",
	} {
		err := k.with(ctx, name, plainCluster+section, func(n *node) {
			tell := func(what, measured string, err error) { tell("tokens, "+name+": "+what, measured, err) }
			runAll(ctx, tell, []check{
				{own, func(ctx context.Context) (string, error) {
					return k.eachPodHasItsOwn(ctx, n, func(string) string { return "" })
				}},
				{"a pod without a token has none", func(ctx context.Context) (string, error) { return "", k.withoutToken(ctx) }},
				{"a token of another pod does not count", k.stolenToken},
				{"a pod that was deleted, and still runs", func(ctx context.Context) (string, error) {
					return k.outlivesItsPod(ctx, name == "TokenReview")
				}},
			})
		})
		if err != nil {
			tell("klamm runs with tokens, "+name, "", err)
		}
	}
}

// watcher is a pod that says of a connection which topics it shows, and whenever that changes.
func watcher(account, broker string) kubernetes.Pod {
	return kubernetes.Pod{Name: "watch-" + account, Image: watchImage, ServiceAccount: account, Audience: "klamm",
		Command: "exec identity watch " + broker}
}

// beWatcher is the program in it. It also goes on after SIGTERM, with which kubelet begins to end a pod.
func beWatcher(args []string) int {
	conn, err := net.Dial("tcp", args[0])
	last := ""
	for {
		now := ""
		if err == nil {
			now, err = look(conn)
		}
		if err != nil {
			now = "error " + err.Error()
		}
		if now != last {
			fmt.Printf("%s %s\n", time.Now().UTC().Format(time.RFC3339Nano), now)
			last = now
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// look is the topics that a connection shows.
func look(conn net.Conn) (string, error) {
	resp, err := stage.Ask(conn, stage.AllTopics())
	if err != nil {
		return "", err
	}
	m, ok := resp.(*kmsg.MetadataResponse)
	if !ok {
		return "", fmt.Errorf("the answer is a %T", resp)
	}
	var names []string
	for _, t := range m.Topics {
		names = append(names, *t.Topic)
	}
	slices.Sort(names)
	return fmt.Sprintf("topics %q", names), nil
}

// said is one line of a watcher.
type said struct {
	at   time.Time
	what string
}

var logLine = regexp.MustCompile(`(?m)^\S+ stdout F (\S+) (.*)$`) // as the container runtime writes it

// says reads what a watcher said last. The container runtime's file is there as long as the pod is.
func (k *k8s) says(s *kubernetes.State) (said, error) {
	file := fmt.Sprintf("/var/log/pods/%s_%s_%s/main/0.log", kubernetes.Namespace, s.Metadata.Name, s.Metadata.UID)
	text, err := os.ReadFile(file)
	if err != nil {
		return said{}, err
	}
	lines := logLine.FindAllStringSubmatch(string(text), -1)
	if len(lines) == 0 {
		return said{}, nil
	}
	last := lines[len(lines)-1]
	at, err := time.Parse(time.RFC3339Nano, last[1])
	return said{at, last[2]}, err
}

// startWatcher starts a watcher and waits until it says so.
func (k *k8s) startWatcher(ctx context.Context, p kubernetes.Pod, want string) (*kubernetes.State, error) {
	if err := k.node.API.Start(ctx, p); err != nil {
		return nil, err
	}
	s, err := k.node.API.AwaitPod(ctx, p.Name, "to run", (*kubernetes.State).Running)
	if err != nil {
		return nil, err
	}
	var last said
	err = until(ctx, p.Name+" to say "+want, waitLimit, func() (_ bool, err error) {
		last, err = k.says(s)
		if errors.Is(err, os.ErrNotExist) {
			return false, nil
		}
		return last.what == want, err
	})
	if err != nil {
		err = errors.Join(fmt.Errorf("%w: it says %q", err, last.what), k.node.API.Remove(ctx, p.Name))
	}
	return s, err
}

const noTopics = "topics []"

func topicOf(account string) string { return fmt.Sprintf("topics [%q]", account) }

func (k *k8s) eachPodHasItsOwn(ctx context.Context, n *node, id func(account string) string) (string, error) {
	for _, account := range []string{"orders", "billing"} {
		p := watcher(account, k.cluster.Addrs()[0])
		s, err := k.startWatcher(ctx, p, topicOf(account))
		if err != nil {
			return "", err
		}
		l, err := n.awaitAudit(ctx, p.Name, func(l auditLine) bool {
			return l.PodUID == s.Metadata.UID && l.Event == "operation"
		})
		if err == nil && (l.SPIFFE != id(account) || !strings.Contains(l.text, account)) {
			err = fmt.Errorf("the audit says %s", l.text)
		}
		if err := errors.Join(err, k.node.API.Remove(ctx, p.Name)); err != nil {
			return "", err
		}
	}
	return "", nil
}

func (k *k8s) noRights(ctx context.Context, account string) error {
	p := watcher(account, k.cluster.Addrs()[0])
	if _, err := k.startWatcher(ctx, p, noTopics); err != nil {
		return err
	}
	return k.node.API.Remove(ctx, p.Name)
}

func (k *k8s) withoutToken(ctx context.Context) error {
	p := watcher("orders", k.cluster.Addrs()[0])
	p.Audience = ""
	if _, err := k.startWatcher(ctx, p, noTopics); err != nil {
		return err
	}
	return k.node.API.Remove(ctx, p.Name)
}

func (k *k8s) podsAreShown(ctx context.Context) (string, error) {
	before, err := writers(k.cluster)
	if err != nil {
		return "", err
	}
	for _, account := range []string{"orders", "billing"} {
		command := fmt.Sprintf("echo x | timeout 30 kcat -P -b %s -t %s", k.cluster.TLSAddrs()[0], account)
		o, err := k.node.API.Run(ctx, kubernetes.Pod{Name: "write-" + account, ServiceAccount: account, Command: command})
		if err == nil && o.Code != 0 {
			err = fmt.Errorf("%v", o)
		}
		if err != nil {
			return "", err
		}
	}
	after, err := writers(k.cluster)
	var saw []string
	for who, n := range after {
		if n > before[who] {
			saw = append(saw, who)
		}
	}
	slices.Sort(saw)
	if want := []string{"User:billing.shop billing", "User:orders.shop orders"}; err == nil && !slices.Equal(saw, want) {
		err = fmt.Errorf("who writes to which topic is %q, want %q", saw, want)
	}
	return strings.Join(saw, ", "), err
}

// deletedPodEnds: kubelet ends its processes, and with them go the connections.
func (k *k8s) deletedPodEnds(ctx context.Context, n *node) (string, error) {
	p := watcher("orders", k.cluster.Addrs()[0])
	s, err := k.startWatcher(ctx, p, topicOf("orders"))
	if err != nil {
		return "", err
	}
	began := time.Now()
	if err := k.node.API.Delete(ctx, p.Name); err != nil {
		return "", err
	}
	l, err := n.awaitAudit(ctx, "the end of the pod's connection", func(l auditLine) bool {
		return l.PodUID == s.Metadata.UID && l.Event == "connection" && l.State == "closed"
	})
	took := l.Time.Sub(began)
	if err == nil && (took < 0 || took > revokedBound) {
		err = fmt.Errorf("it took %v, want at most %v", took, revokedBound)
	}
	return fmt.Sprintf("%.1f s after the pod was deleted", took.Seconds()), errors.Join(err, k.gone(ctx, p.Name))
}

func (k *k8s) gone(ctx context.Context, pod string) error {
	return kubernetes.Await(ctx, "the end of "+pod, func() (bool, error) {
		_, err := k.node.API.State(ctx, pod)
		if kubernetes.Is(err, http.StatusNotFound) {
			return true, nil
		}
		return false, err
	})
}

// stolenToken: a pod of another service account shows the token of orders, which was copied into it, as its own.
func (k *k8s) stolenToken(ctx context.Context) (string, error) {
	request := `{apiVersion: authentication.k8s.io/v1, kind: TokenRequest,
  spec: {audiences: [klamm], expirationSeconds: 600}}`
	answer, err := k.node.API.Call(ctx, http.MethodPost, serviceAccounts+"/orders/token", request)
	if err != nil {
		return "", err
	}
	var token struct {
		Status struct {
			Token string `json:"token"`
		} `json:"status"`
	}
	if err := json.Unmarshal(answer, &token); err != nil {
		return "", err
	}
	p := watcher("billing", k.cluster.Addrs()[0])
	p.Audience = ""
	p.Command = fmt.Sprintf("mkdir -p %s && echo %s > %s && %s", filepath.Dir(kubernetes.TokenFile), token.Status.Token,
		kubernetes.TokenFile, p.Command)
	if _, err := k.startWatcher(ctx, p, noTopics); err != nil {
		return "", err
	}
	return "", k.node.API.Remove(ctx, p.Name)
}

// outlivesItsPod: the pod is deleted at the API server, and kubelet, which would end it, hangs.
func (k *k8s) outlivesItsPod(ctx context.Context, reviewed bool) (measured string, err error) {
	p := watcher("orders", k.cluster.Addrs()[0])
	s, err := k.startWatcher(ctx, p, topicOf("orders"))
	if err != nil {
		return "", err
	}
	if err := syscall.Kill(k.node.PID("kubelet"), syscall.SIGSTOP); err != nil {
		return "", err
	}
	defer func() {
		err = errors.Join(err, syscall.Kill(k.node.PID("kubelet"), syscall.SIGCONT), k.gone(ctx, p.Name))
	}()
	_, err = k.node.API.Call(ctx, http.MethodDelete, "/api/v1/namespaces/"+kubernetes.Namespace+"/pods/"+p.Name+
		"?gracePeriodSeconds="+strconv.Itoa(0), "")
	if err != nil {
		return "", err
	}
	began := time.Now()
	if !reviewed {
		time.Sleep(2 * reviewBound)
		last, err := k.says(s)
		if err == nil && last.what != topicOf("orders") {
			err = fmt.Errorf("it says %q, %v after its pod was deleted", last.what, last.at.Sub(began))
		}
		return fmt.Sprintf("its token still counts after %v, up to its end", 2*reviewBound), err
	}
	var last said
	err = until(ctx, "the end of its rights", waitLimit, func() (_ bool, err error) {
		last, err = k.says(s)
		return last.what != topicOf("orders"), err
	})
	took := last.at.Sub(began)
	if err == nil && took > reviewBound {
		err = fmt.Errorf("it took longer than %v", reviewBound)
	}
	return fmt.Sprintf("rights end %.1f s after its pod was deleted", took.Seconds()), err
}
