package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"klamm/test/host"
	"klamm/test/kafka"
)

// Two hosts, each a network namespace with a node of its own; the broker is on the second.
const (
	hostA = "10.77.0.1"
	hostB = "10.77.0.2"
)

// twoHosts runs hosts in network and mount namespaces of its own, which become the second host.
func twoHosts(ctx context.Context, _ bool, tell func(string, error)) {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "hosts")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGTERM}
	readLines(ctx, tell, cmd)
}

// site is one of the hosts.
type site struct {
	dir, cgroup, namespace string
	node                   *host.Supervisor
}

// hosts prints a line for each check.
func hosts(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp("", "klamm-hosts-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	cgroup, err := host.NewCgroup("klamm-hosts-", "a/clients", "a/node", "b/clients", "b/node", "b/broker")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, host.RemoveCgroup(cgroup)) }()
	if err := withoutNames(dir); err != nil {
		return err
	}
	first, err := wire()
	if err != nil {
		return err
	}
	cluster, err := kafka.New(ctx, kafka.Options{Hosts: []string{hostB}, Cgroup: filepath.Join(cgroup, "b/broker")})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cluster.Stop()) }()
	for _, topic := range []string{hidden, "load-hosts"} {
		if err := cluster.CreateTopic(ctx, topic, 1); err != nil {
			return err
		}
	}
	pid, broker := os.Getpid(), cluster.Addrs()[0]
	a := &site{dir: filepath.Join(dir, "a"), cgroup: filepath.Join(cgroup, "a"),
		namespace: fmt.Sprintf("/proc/%d/fd/%d", pid, first)}
	b := &site{dir: filepath.Join(dir, "b"), cgroup: filepath.Join(cgroup, "b"),
		namespace: fmt.Sprintf("/proc/%d/ns/net", pid)}
	exempt := "/" + filepath.Base(cgroup) + "/b/broker"
	defer func() { err = errors.Join(err, a.stop(), b.stop()) }()
	if err := errors.Join(a.start(broker, exempt), b.start(broker, exempt)); err != nil {
		return err
	}
	return checkHosts(broker, a, b)
}

// checkHosts prints what it found.
func checkHosts(broker string, a, b *site) error {
	enforced := func(c connected) bool { return c.Enforced > 0 && c.Unenforced == 0 }
	refused := func(c connected) bool {
		return c.Enforced+c.Unenforced == 0 && c.Ended[syscall.ECONNREFUSED.Error()] > 0
	}
	kill := func() error {
		err := a.node.End(syscall.SIGKILL)
		a.node.Forget()
		return err
	}
	failed := 0
	for _, c := range []struct {
		name   string
		before func() error
		site   *site
		below  string
		want   func(connected) bool
	}{
		{"a client on another host than the broker is enforced by its own node", nil, a, "clients", enforced},
		{"a client on the broker's host is enforced by the node there", nil, b, "clients", enforced},
		{"the broker itself, which is exempt, connects directly", nil, b, "broker",
			func(c connected) bool { return c.Enforced == 0 && c.Unenforced > 0 }},
		{"each node has its clients on record", func() error { return errors.Join(a.recorded(), b.recorded()) },
			b, "clients", enforced},
		{"without its node a client is refused", kill, a, "clients", refused},
		{"while the other host's goes on", nil, b, "clients", enforced},
	} {
		var err error
		if c.before != nil {
			err = c.before()
		}
		saw, serr := c.site.connects(broker, c.below)
		if err = errors.Join(err, serr); err == nil && !c.want(saw) {
			err = fmt.Errorf("it saw %+v", saw)
		}
		if err != nil {
			failed++
			fmt.Printf("  FAIL  %s\n%v\n", c.name, err)
			continue
		}
		fmt.Printf("  pass  %s\n", c.name)
	}
	if failed > 0 {
		return errFailed
	}
	return nil
}

// errFailed says that checks failed, which have told why.
var errFailed = errors.New("checks failed")

// withoutNames lets lookups of names fail at once: nobody serves them here, and Kafka would wait for each.
func withoutNames(dir string) error {
	file := filepath.Join(dir, "resolv.conf")
	return errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		os.WriteFile(file, []byte("nameserver 127.0.0.1\n"), 0o600),
		unix.Mount(file, "/etc/resolv.conf", "", unix.MS_BIND, ""))
}

// wire connects the calling process's network namespace, the second host, to a new one, the first.
func wire() (first netns.NsHandle, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	second, err := netns.Get()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, netns.Set(second), second.Close()) }()
	if first, err = netns.New(); err != nil {
		return 0, err
	}
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "up"}, PeerName: "up", PeerNamespace: netlink.NsFd(second)}
	if err := netlink.LinkAdd(veth); err != nil {
		return 0, err
	}
	if err := connectTo(hostA, hostB); err != nil {
		return 0, err
	}
	if err := netns.Set(second); err != nil {
		return 0, err
	}
	return first, connectTo(hostB, hostA)
}

// connectTo gives the current network namespace its address and a default route.
func connectTo(own, other string) error {
	for _, name := range []string{"lo", "up"} {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if name == "up" {
			address := &net.IPNet{IP: net.ParseIP(own), Mask: net.CIDRMask(24, 32)}
			if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: address}); err != nil {
				return err
			}
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return err
		}
	}
	return netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(other)})
}

func (s *site) start(broker, exempt string) error {
	bpffs := filepath.Join(s.dir, "bpf")
	if err := errors.Join(os.MkdirAll(bpffs, 0o700), unix.Mount("bpffs", bpffs, "bpf", 0, "mode=0700")); err != nil {
		return err
	}
	mode := "refuse"
	if os.Getenv("MUTATE") == "1" {
		mode = "pass, firewall: false"
	}
	config := fmt.Sprintf(`node: {name: %s, cgroup: %s, pins: bpf/klamm, socket: klamm.sock}
intercept: {exempt: [{cgroup: %s}], on-enforcer-down: %s}
clusters: [{name: main, bootstrap: [%q]}]
identities: [{name: client, spiffe-id: "spiffe://example.test/client", uid: %d}]
policies: [policy.yaml]
audit: {file: audit.jsonl}
metrics: {listen: ""}
`, filepath.Base(s.dir), s.cgroup, exempt, mode, broker, clientUID)
	log, err := os.Create(filepath.Join(s.dir, "node.log"))
	if err != nil {
		return err
	}
	if err := errors.Join(os.WriteFile(filepath.Join(s.dir, "klamm.yaml"), []byte(config), 0o600),
		os.WriteFile(filepath.Join(s.dir, "policy.yaml"), []byte(policy), 0o600)); err != nil {
		return err
	}
	if s.node, err = host.NewSupervisor(kafka.Place{Cgroup: filepath.Join(s.cgroup, "node")}, s.dir, log,
		"nsenter", "--net="+s.namespace, "bin/klamm", "node", "-c", filepath.Join(s.dir, "klamm.yaml")); err != nil {
		return err
	}
	return s.node.Start()
}

func (s *site) stop() error {
	pins := filepath.Join(s.dir, "bpf")
	var err error
	if s.node != nil {
		err = errors.Join(s.node.End(syscall.SIGKILL), s.node.Close())
	}
	return errors.Join(err, os.RemoveAll(filepath.Join(pins, "klamm")), unix.Unmount(pins, 0))
}

// connects runs a client for longer than a node that is gone counts as up.
func (s *site) connects(broker, below string) (c connected, err error) {
	p, err := host.StartSelf(kafka.Place{Cgroup: filepath.Join(s.cgroup, below)}, "connect", broker, s.namespace)
	if err != nil {
		return c, err
	}
	time.Sleep(heartbeatOver / 2)
	return c, finish(p, &c)
}

// recorded tells whether the node has its client on record.
func (s *site) recorded() error {
	audit, err := os.ReadFile(filepath.Join(s.dir, "audit.jsonl"))
	if err != nil {
		return err
	}
	if !strings.Contains(string(audit), `"spiffe_id":"spiffe://example.test/client"`) {
		return fmt.Errorf("%s has no line of its client", s.dir)
	}
	return nil
}
