package kubernetes

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

	"golang.org/x/sys/unix"

	"klamm/test/kafka"
)

// The network: the broker's host, which is where this program is, and the node, with a link between them. Addresses are
// those for documentation (RFC 5737).
const (
	BrokerIP  = "192.0.2.2"
	BrokerEnd = "to-node" // of the link
	NodeIP    = "192.0.2.1"
	podSubnet = "198.51.100.0/24"
	netns     = "/run/netns/node"
	URL       = "https://" + NodeIP + ":6443" // of the API server
	Name      = "node1"                       // of the node
)

const commandsOfTheNetwork = `
ip link set lo up
ip netns add node
ip link add to-node type veth peer name uplink netns node
ip address add ` + BrokerIP + `/24 dev to-node
ip link set to-node up
ip route add ` + podSubnet + ` via ` + NodeIP + `
ip -n node link set lo up
ip -n node address add ` + NodeIP + `/24 dev uplink
ip -n node link set uplink up
ip -n node route add default via ` + BrokerIP + `
nsenter --net=` + netns + ` sysctl -qw net.ipv4.ip_forward=1
`

// Node is a node, and the host next to it.
type Node struct {
	Dir       string // configuration and logs
	Cgroup    string // the node's in cgroup2: its processes, its pods and klamm
	API       *API
	Authority *Authority          // of the cluster
	bin       string              // the node's programs
	running   map[string]*program // by name of its log
}

type program struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when it has
}

//go:embed config
var config embed.FS

// New makes what a node needs: its mounts, its network, and its configuration, in the directory and the cgroup that
// [Enter] gave.
func New(dir, cgroup string) (*Node, error) {
	cache, err := kafka.Cache()
	if err != nil {
		return nil, err
	}
	n := &Node{Dir: dir, Cgroup: cgroup, bin: filepath.Join(cache, "kubernetes/current"), running: map[string]*program{}}
	for _, step := range []func() error{n.ownMounts, n.network, n.configure} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// ownMounts hides from the host what the node mounts, and from the node what the host has in the same places.
func (n *Node) ownMounts() error {
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

func (n *Node) network() error {
	for line := range strings.Lines(strings.TrimSpace(commandsOfTheNetwork)) {
		words := strings.Fields(line)
		if out, err := exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("make the network: %s: %w\n%s", strings.TrimSpace(line), err, out)
		}
	}
	return nil
}

// configure writes all files the node is told by.
func (n *Node) configure() error {
	if err := os.Mkdir(filepath.Join(n.Dir, "cni"), 0o755); err != nil {
		return err
	}
	ca, err := newAuthority(n.Dir)
	if err != nil {
		return err
	}
	n.Authority = ca
	_, tokens := newKey(n.Dir, "tokens")
	err = errors.Join(tokens,
		ca.Server("apiserver", NodeIP, "127.0.0.1"),
		ca.Server("kubelet-server", NodeIP),
		ca.Client("admin", "admin", "system:masters"),
		ca.Client("controllers", "system:kube-controller-manager", ""),
		ca.Client("kubelet", "system:node:"+Name, "system:nodes"))
	if err != nil {
		return err
	}
	for file, from := range map[string]string{
		"containerd.toml": "containerd.toml", "cni/klamm.conflist": "cni.conflist", "kubelet.yaml": "kubelet.yaml",
		"authentication.yaml": "authentication.yaml", "admin.kubeconfig": "kubeconfig.yaml",
		"controllers.kubeconfig": "kubeconfig.yaml", "kubelet.kubeconfig": "kubeconfig.yaml",
	} {
		if err := n.write(file, from); err != nil {
			return fmt.Errorf("write %s: %w", file, err)
		}
	}
	n.API, err = newAPI(n.Dir, URL)
	return err
}

func (n *Node) write(file, from string) error {
	t, err := template.ParseFS(config, "config/"+from)
	if err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(n.Dir, file))
	if err != nil {
		return err
	}
	user, _, _ := strings.Cut(file, ".")
	return errors.Join(t.Execute(f, map[string]string{
		"Dir": n.Dir, "Bin": n.bin, "Cgroup": filepath.Base(n.Cgroup), "NodeIP": NodeIP, "Pods": podSubnet,
		"Pause": pauseImage, "API": URL, "User": user,
	}), f.Close())
}

// Programs are the command lines of the node, by the names of their logs. {dir} is the rig's directory.
var Programs = map[string]string{
	"etcd": "etcd --data-dir=/var/lib/etcd --unsafe-no-fsync --listen-client-urls=http://127.0.0.1:2379" +
		" --advertise-client-urls=http://127.0.0.1:2379 --listen-peer-urls=http://127.0.0.1:2380",
	"apiserver": "kube-apiserver --etcd-servers=http://127.0.0.1:2379 --advertise-address=" + NodeIP +
		" --endpoint-reconciler-type=none --cert-dir=/run/apiserver --tls-cert-file={dir}/apiserver.crt" +
		" --tls-private-key-file={dir}/apiserver.key --client-ca-file={dir}/ca.crt" +
		" --service-account-issuer=" + URL + " --service-account-signing-key-file={dir}/tokens.key" +
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
		" --hostname-override=" + Name + " --node-ip=" + NodeIP,
}

// Start starts a program of the node in its network namespace and its cgroup.
func (n *Node) Start(name, below, command string) error {
	dir := filepath.Join(n.Cgroup, below)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(n.Dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	words := strings.Fields(strings.ReplaceAll(command, "{dir}", n.Dir))
	cmd := exec.Command("nsenter", append([]string{"--net=" + netns, "--"}, words...)...)
	cmd.Env = append(os.Environ(), "PATH="+n.bin+":"+os.Getenv("PATH"))
	cmd.Stdout, cmd.Stderr = log, log
	if err := (kafka.Place{Cgroup: dir}).Start(cmd); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	p := &program{cmd, make(chan struct{})}
	n.running[name] = p
	go func() {
		_ = cmd.Wait() // how it ended is in its log
		close(p.ended)
	}()
	return nil
}

// Stop ends a program of the node, by SIGTERM or SIGKILL.
func (n *Node) Stop(name string, how syscall.Signal) error {
	p := n.running[name]
	if err := p.cmd.Process.Signal(how); err != nil {
		return fmt.Errorf("end %s: %w", name, err)
	}
	select {
	case <-p.ended:
		return nil
	case <-time.After(Limit):
		return fmt.Errorf("%s did not end", name)
	}
}

// Run starts the node and waits until it takes pods.
func (n *Node) Run(ctx context.Context) error {
	for _, name := range []string{"etcd", "apiserver", "containerd"} {
		if err := n.Start(name, "node", Programs[name]); err != nil {
			return err
		}
	}
	if err := n.importImages(ctx); err != nil {
		return err
	}
	err := Await(ctx, "the API server", func() (bool, error) {
		_, err := n.API.Call(ctx, http.MethodGet, "/readyz", "")
		return err == nil, n.Alive("apiserver")
	})
	if err != nil {
		return err
	}
	for _, name := range []string{"controllers", "scheduler", "kubelet"} {
		if err := n.Start(name, "node", Programs[name]); err != nil {
			return err
		}
	}
	if err := n.makeNamespace(ctx); err != nil {
		return err
	}
	return Await(ctx, "the node to be ready", func() (bool, error) {
		var node struct {
			Status struct {
				Conditions []struct {
					Type   string `json:"type"`
					Status string `json:"status"`
				} `json:"conditions"`
			} `json:"status"`
		}
		if err := n.API.Get(ctx, "/api/v1/nodes/"+Name, &node); err != nil {
			return false, n.Alive("kubelet") // it registers itself
		}
		for _, c := range node.Status.Conditions {
			if c.Type == "Ready" && c.Status == "True" {
				return true, nil
			}
		}
		return false, n.Alive("kubelet")
	})
}

// Alive returns an error with the end of its log when a program has ended.
func (n *Node) Alive(name string) error {
	select {
	case <-n.running[name].ended:
	default:
		return nil
	}
	text, _ := os.ReadFile(filepath.Join(n.Dir, name+".log"))
	return fmt.Errorf("%s has ended; its log ends:\n%s", name, text[max(0, len(text)-2000):])
}

func (n *Node) importImages(ctx context.Context) error {
	err := Await(ctx, "containerd", func() (bool, error) {
		return exec.Command(filepath.Join(n.bin, "ctr"), "version").Run() == nil, n.Alive("containerd")
	})
	if err != nil {
		return err
	}
	archives, err := filepath.Glob(filepath.Join(n.Dir, "*.tar"))
	if err != nil {
		return err
	}
	for _, archive := range archives {
		out, err := exec.Command(filepath.Join(n.bin, "ctr"), "-n", "k8s.io", "images", "import", archive).CombinedOutput()
		if err != nil {
			return fmt.Errorf("import %s: %w\n%s", archive, err, out)
		}
	}
	return nil
}

// makeNamespace also waits for its service account, without which it takes no pods.
func (n *Node) makeNamespace(ctx context.Context) error {
	_, err := n.API.Call(ctx, http.MethodPost, "/api/v1/namespaces",
		"apiVersion: v1\nkind: Namespace\nmetadata: {name: "+Namespace+"}\n")
	if err != nil {
		return err
	}
	return Await(ctx, "the service account of "+Namespace, func() (bool, error) {
		_, err := n.API.Call(ctx, http.MethodGet, "/api/v1/namespaces/"+Namespace+"/serviceaccounts/default", "")
		return err == nil, n.Alive("controllers")
	})
}

// PID is the process id of a program of the node.
func (n *Node) PID(name string) int { return n.running[name].cmd.Process.Pid }
