package main

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"text/template"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
	"golang.org/x/sys/unix"

	"klamm/test/kafka"
)

// The network: the broker's host, which is where this program is, and the node, with a link between them. Addresses are
// those for documentation (RFC 5737).
const (
	brokerIP  = "192.0.2.2"
	nodeIP    = "192.0.2.1"
	podSubnet = "198.51.100.0/24"
	netns     = "/run/netns/node"
	apiURL    = "https://" + nodeIP + ":6443"
	nodeName  = "node1"
)

const commandsOfTheNetwork = `
ip link set lo up
ip netns add node
ip link add to-node type veth peer name uplink netns node
ip address add ` + brokerIP + `/24 dev to-node
ip link set to-node up
ip route add ` + podSubnet + ` via ` + nodeIP + `
ip -n node link set lo up
ip -n node address add ` + nodeIP + `/24 dev uplink
ip -n node link set uplink up
ip -n node route add default via ` + brokerIP + `
nsenter --net=` + netns + ` sysctl -qw net.ipv4.ip_forward=1
`

// rig is a node, a broker on another host, and what is between them.
type rig struct {
	dir     string // configuration and logs
	bin     string // the node's programs
	cgroup  string // the node's in cgroup2: its processes, its pods and klamm
	api     *api
	cluster *kafka.Cluster
	admin   *kgo.Client
	wire    *wire
	running map[string]*program // by name of its log
	around  int                 // packets of pods at the broker before klamm had all
	missing error               // why there is no klamm
}

type program struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when it has
}

//go:embed config
var config embed.FS

func newRig(ctx context.Context, dir, cgroup string) (_ *rig, err error) {
	cache, err := kafka.Cache()
	if err != nil {
		return nil, err
	}
	r := &rig{dir: dir, cgroup: cgroup, running: map[string]*program{}}
	r.bin = filepath.Join(cache, "kubernetes/current")
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	for _, step := range []func() error{r.ownMounts, r.network, r.configure} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	if r.wire, err = listenOnWire("to-node"); err != nil {
		return nil, err
	}
	broker := make(chan error, 1)
	go func() { broker <- r.startBroker(ctx) }()
	return r, errors.Join(r.startNode(ctx), <-broker)
}

// close ends what would not end with this program. The node is killed from outside.
func (r *rig) close() error {
	var failures []error
	if r.admin != nil {
		r.admin.Close()
	}
	if r.cluster != nil {
		failures = append(failures, r.cluster.Stop())
	}
	return errors.Join(failures...)
}

// ownMounts hides from the host what the node mounts, and from the node what the host has in the same places.
func (r *rig) ownMounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make the mounts private: %w", err)
	}
	for _, dir := range []string{"/run", "/var/lib", "/var/log"} {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
			return fmt.Errorf("mount a tmpfs on %s: %w", dir, err)
		}
	}
	if err := unix.Mount("bpf", "/sys/fs/bpf", "bpf", 0, "mode=700"); err != nil {
		return fmt.Errorf("mount the BPF file system: %w", err)
	}
	return nil
}

func (r *rig) network() error {
	for line := range strings.Lines(strings.TrimSpace(commandsOfTheNetwork)) {
		words := strings.Fields(line)
		if out, err := exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("make the network: %s: %w\n%s", strings.TrimSpace(line), err, out)
		}
	}
	return nil
}

// configure writes all files the node is told by.
func (r *rig) configure() error {
	if err := os.Mkdir(filepath.Join(r.dir, "cni"), 0o755); err != nil {
		return err
	}
	ca, err := newAuthority(r.dir)
	if err != nil {
		return err
	}
	_, tokens := newKey(r.dir, "tokens")
	err = errors.Join(tokens,
		ca.server("apiserver", nodeIP, "127.0.0.1"),
		ca.client("admin", "admin", "system:masters"),
		ca.client("controllers", "system:kube-controller-manager", ""),
		ca.client("kubelet", "system:node:"+nodeName, "system:nodes"))
	if err != nil {
		return err
	}
	for file, from := range map[string]string{
		"containerd.toml": "containerd.toml", "cni/klamm.conflist": "cni.conflist", "kubelet.yaml": "kubelet.yaml",
		"authentication.yaml": "authentication.yaml", "admin.kubeconfig": "kubeconfig.yaml",
		"controllers.kubeconfig": "kubeconfig.yaml", "kubelet.kubeconfig": "kubeconfig.yaml",
	} {
		if err := r.write(file, from); err != nil {
			return fmt.Errorf("write %s: %w", file, err)
		}
	}
	r.api, err = newAPI(r.dir, apiURL)
	return err
}

func (r *rig) write(file, from string) error {
	t, err := template.ParseFS(config, "config/"+from)
	if err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(r.dir, file))
	if err != nil {
		return err
	}
	user, _, _ := strings.Cut(file, ".")
	return errors.Join(t.Execute(f, map[string]string{
		"Dir": r.dir, "Bin": r.bin, "Cgroup": filepath.Base(r.cgroup), "NodeIP": nodeIP, "Pods": podSubnet,
		"Pause": pauseImage, "API": apiURL, "User": user,
	}), f.Close())
}

// programs are the command lines of the node, by the names of their logs. {dir} is the rig's directory.
var programs = map[string]string{
	"etcd": "etcd --data-dir=/var/lib/etcd --unsafe-no-fsync --listen-client-urls=http://127.0.0.1:2379" +
		" --advertise-client-urls=http://127.0.0.1:2379 --listen-peer-urls=http://127.0.0.1:2380",
	"apiserver": "kube-apiserver --etcd-servers=http://127.0.0.1:2379 --advertise-address=" + nodeIP +
		" --endpoint-reconciler-type=none --cert-dir=/run/apiserver --tls-cert-file={dir}/apiserver.crt" +
		" --tls-private-key-file={dir}/apiserver.key --client-ca-file={dir}/ca.crt" +
		" --service-account-issuer=" + apiURL + " --service-account-signing-key-file={dir}/tokens.key" +
		" --service-account-key-file={dir}/tokens.pub --authentication-config={dir}/authentication.yaml" +
		" --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction" +
		" --service-cluster-ip-range=10.96.0.0/16 --kubelet-preferred-address-types=InternalIP" +
		" --kubelet-client-certificate={dir}/admin.crt --kubelet-client-key={dir}/admin.key",
	"controllers": "kube-controller-manager --kubeconfig={dir}/controllers.kubeconfig --cert-dir=/run/controllers" +
		" --bind-address=127.0.0.1 --leader-elect=false --use-service-account-credentials" +
		" --flex-volume-plugin-dir=/var/lib/kubelet/volume-plugins" + // the default is below /usr
		" --service-account-private-key-file={dir}/tokens.key --root-ca-file={dir}/ca.crt",
	"scheduler": "kube-scheduler --kubeconfig={dir}/admin.kubeconfig --cert-dir=/run/scheduler" +
		" --bind-address=127.0.0.1 --leader-elect=false",
	"containerd": "containerd --config={dir}/containerd.toml",
	"kubelet": "kubelet --config={dir}/kubelet.yaml --kubeconfig={dir}/kubelet.kubeconfig --cert-dir=/run/kubelet" +
		" --hostname-override=" + nodeName + " --node-ip=" + nodeIP,
}

// start starts a program of the node in its network namespace and its cgroup.
func (r *rig) start(name, below, command string) error {
	dir := filepath.Join(r.cgroup, below)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(r.dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	words := strings.Fields(strings.ReplaceAll(command, "{dir}", r.dir))
	cmd := exec.Command("nsenter", append([]string{"--net=" + netns, "--"}, words...)...)
	cmd.Env = append(os.Environ(), "PATH="+r.bin+":"+os.Getenv("PATH"))
	cmd.Stdout, cmd.Stderr = log, log
	if err := (kafka.Place{Cgroup: dir}).Start(cmd); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	p := &program{cmd, make(chan struct{})}
	r.running[name] = p
	go func() {
		_ = cmd.Wait() // how it ended is in its log
		close(p.ended)
	}()
	return nil
}

// stop ends a program of the node, by SIGTERM or SIGKILL.
func (r *rig) stop(name string, how syscall.Signal) error {
	p := r.running[name]
	if err := p.cmd.Process.Signal(how); err != nil {
		return fmt.Errorf("end %s: %w", name, err)
	}
	select {
	case <-p.ended:
		return nil
	case <-time.After(limit):
		return fmt.Errorf("%s did not end", name)
	}
}

// startNode starts the node and waits until it takes pods.
func (r *rig) startNode(ctx context.Context) error {
	for _, name := range []string{"etcd", "apiserver", "containerd"} {
		if err := r.start(name, "node", programs[name]); err != nil {
			return err
		}
	}
	if err := r.importImages(ctx); err != nil {
		return err
	}
	err := await(ctx, "the API server", func() (bool, error) {
		_, err := r.api.call(ctx, http.MethodGet, "/readyz", "")
		return err == nil, r.alive("apiserver")
	})
	if err != nil {
		return err
	}
	for _, name := range []string{"controllers", "scheduler", "kubelet"} {
		if err := r.start(name, "node", programs[name]); err != nil {
			return err
		}
	}
	if err := r.makeNamespace(ctx); err != nil {
		return err
	}
	return await(ctx, "the node to be ready", func() (bool, error) {
		var node struct {
			Status struct {
				Conditions []struct {
					Type   string `json:"type"`
					Status string `json:"status"`
				} `json:"conditions"`
			} `json:"status"`
		}
		if err := r.api.get(ctx, "/api/v1/nodes/"+nodeName, &node); err != nil {
			return false, r.alive("kubelet") // it registers itself
		}
		for _, c := range node.Status.Conditions {
			if c.Type == "Ready" && c.Status == "True" {
				return true, nil
			}
		}
		return false, r.alive("kubelet")
	})
}

// alive returns an error with the end of its log when a program has ended.
func (r *rig) alive(name string) error {
	select {
	case <-r.running[name].ended:
	default:
		return nil
	}
	text, _ := os.ReadFile(filepath.Join(r.dir, name+".log"))
	return fmt.Errorf("%s has ended; its log ends:\n%s", name, text[max(0, len(text)-2000):])
}

func (r *rig) importImages(ctx context.Context) error {
	err := await(ctx, "containerd", func() (bool, error) {
		return exec.Command(filepath.Join(r.bin, "ctr"), "version").Run() == nil, r.alive("containerd")
	})
	if err != nil {
		return err
	}
	archives, err := filepath.Glob(filepath.Join(r.dir, "*.tar"))
	if err != nil {
		return err
	}
	for _, archive := range archives {
		out, err := exec.Command(filepath.Join(r.bin, "ctr"), "-n", "k8s.io", "images", "import", archive).CombinedOutput()
		if err != nil {
			return fmt.Errorf("import %s: %w\n%s", archive, err, out)
		}
	}
	return nil
}

// makeNamespace also waits for its service account, without which it takes no pods.
func (r *rig) makeNamespace(ctx context.Context) error {
	_, err := r.api.call(ctx, http.MethodPost, "/api/v1/namespaces",
		"apiVersion: v1\nkind: Namespace\nmetadata: {name: "+namespace+"}\n")
	if err != nil {
		return err
	}
	return await(ctx, "the service account of "+namespace, func() (bool, error) {
		_, err := r.api.call(ctx, http.MethodGet, "/api/v1/namespaces/"+namespace+"/serviceaccounts/default", "")
		return err == nil, r.alive("controllers")
	})
}
