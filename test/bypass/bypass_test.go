// Package bypass tries every way around the redirect that is known, and judges each at the broker: by what comes over
// the wire, not by what the node or the attacker say. Each vector is tried twice: in a world without a node, where it
// must reach the broker, or it proves nothing; and in one with a node, where it must be intercepted or refused.
//
// Environment: MUTATE=1 switches a line of defence off, and an address rule of the binary, so that the tests must fail.
// KLAMM_VERIFY=1 takes the binary and a real Kafka, and writes the table of results into the threat model.
package bypass

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	for _, p := range []struct {
		variable string
		main     func(string) error
	}{{nodeVariable, runNode}, {secondVariable, second}, {attackVariable, attack}} {
		if value := os.Getenv(p.variable); value != "" {
			if err := p.main(value); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(0)
		}
	}
	flag.Parse()
	code := m.Run()
	if *klammBinary != "" && os.Getenv("MUTATE") == "1" {
		if binary, err := mutated(); err == nil {
			_ = os.Remove(binary)
		}
	}
	if b, err := theBackend(); err == nil && *realKafka {
		if err := b.stop(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// A vector is one way around.
type vector struct {
	name string // what the attacker does
	as   rights
	from place
	want verdict // with a node
	// hole says of a vector that is wanted to reach the broker what compensates.
	hole string
	// raced holes are found only by an attacker who is in time: it is no fault if this one was not.
	raced bool
	// uncontrolled says why the vector cannot be tried without a node.
	uncontrolled string
	attack       func(*attacker) error
	// before is what the attacker does before the wire is judged.
	before func(*attacker) error
	// cold attackers have not made sure that the broker answers; their namespace may not be enrolled yet.
	cold bool
	// own vectors have a world for themselves, because they or meanwhile change it.
	own bool
	// stage prepares the world, before the attacker is started.
	stage func(testing.TB, *scene)
	// meanwhile is done to the world before the attack.
	meanwhile func(testing.TB, *scene)
	// unguarded worlds have no node before meanwhile starts one.
	unguarded bool
	// intercept is what is added to that section of the node's klamm.yaml.
	intercept string
	// help is what the test does for the attacker that asks for it; the key is the first word.
	help map[string]func(t testing.TB, s *scene, argument string) string
	// cgroup is the one the attacker is in, of those of the world. Default: podsCgroup.
	cgroup string
}

// rights are those of an attacker.
type rights int

const (
	user    rights = iota // none
	netRaw                // CAP_NET_RAW, as containers have by default
	podRoot               // CAP_NET_RAW and CAP_NET_ADMIN
	podBPF                // and CAP_BPF
	root                  // every capability
)

var capabilities = map[rights][]uintptr{
	netRaw:  {unix.CAP_NET_RAW},
	podRoot: {unix.CAP_NET_RAW, unix.CAP_NET_ADMIN},
	podBPF:  {unix.CAP_NET_RAW, unix.CAP_NET_ADMIN, unix.CAP_BPF, unix.CAP_PERFMON},
}

var rightsNames = map[rights]string{user: "user", netRaw: "NET_RAW", podRoot: "NET_ADMIN", podBPF: "NET_ADMIN, BPF",
	root: "root"}

// place is where an attacker is.
type place int

const (
	inPod place = iota
	inBridgedPod
	onMacvlan       // in a pod with a device on the host's uplink
	onHost          // in the namespace of the node
	inUserNamespace // and a network namespace that it owns: root of a rootless container
)

// verdict is what came of an attack, seen from the broker.
type verdict string

const (
	intercepted verdict = "intercepted" // the broker got what the attacker said from the node alone, which audited it
	refused     verdict = "refused"     // the broker got nothing
	reached     verdict = "reached"     // the broker got something from the attacker
	lacking     verdict = "not on this kernel"
	neither     verdict = "unclear"
)

func vectors() []vector {
	return slices.Concat(addresses, sockets, rings, descriptors, namespaces, cgroups, listeners, packets, tricks, networks,
		lifetimes, holes)
}

func find(name string) *vector {
	all := vectors()
	if i := slices.IndexFunc(all, func(v vector) bool { return v.name == name }); i >= 0 {
		return &all[i]
	}
	return nil
}

// outcome is a vector's.
type outcome struct {
	vector         vector
	control, guard verdict
	before, how    string // as the attacker saw it, without and with the node
}

func (o outcome) ok() bool {
	asWanted := o.guard == o.vector.want || o.vector.raced && o.guard == intercepted
	return asWanted && (o.control == reached || o.vector.uncontrolled != "") ||
		o.control == lacking && o.guard != reached
}

func TestNoWayAroundTheNode(t *testing.T) {
	open, guarded := newWorld(t), newWorld(t)
	guarded.guard(t, "")
	open.makePods(t)
	guarded.makePods(t)
	var outcomes []outcome
	for _, v := range vectors() {
		t.Run(v.name, func(t *testing.T) {
			o := outcome{vector: v, guard: neither}
			defer func() { outcomes = append(outcomes, o) }()
			if v.uncontrolled == "" {
				o.control, o.before = open.try(t, v)
			}
			o.guard, o.how = guarded.try(t, v)
			if !o.ok() {
				t.Errorf("%s (%s), want %s; without a node %s (%s)", o.guard, o.how, v.want, o.control, o.before)
			}
		})
	}
	tabulate(t, outcomes)
}

// scene is one attack under way.
type scene struct {
	*world
	pod   *namespace // of the attacker; nil on the host
	pid   int        // of the attacker
	heard []listening

	guarded bool // by a node, now or later
}

// listening is a wire that is judged, and how to send a packet over it.
type listening struct {
	wire *wire
	from *namespace
	to   netip.Addr
	mark int
}

// try has an attacker attack and judges.
func (w *world) try(t *testing.T, v vector) (verdict, string) {
	guarded := w.node != nil
	if v.own {
		w = newWorld(t)
		if guarded && !v.unguarded {
			w.guard(t, v.intercept)
		}
	}
	s := &scene{world: w, guarded: guarded, heard: []listening{{wire: w.wire, from: w.host, to: broker4}}}
	w.tries++
	o := orders{Vector: v.name, Marker: fmt.Sprintf("attack-%d-", w.tries), Cgroup: w.cgroup, outlet: hostOutlet}
	if v.from <= onMacvlan {
		p := w.ready[v.name]
		if p == nil {
			p = w.newPod(t, v)
		}
		w.wire.fence(t, p.do, broker6)
		s.pod, o.outlet = p.namespace, p.outlet
	}
	if v.stage != nil {
		v.stage(t, s)
	}
	begun := false
	r := s.run(t, v, o, func(what string) string {
		word, argument, _ := strings.Cut(what, " ")
		if help := v.help[word]; help != nil {
			return help(t, s, argument)
		}
		if word == "plug" {
			return plug(t, s, argument)
		}
		begun = word == "begin"
		if v.meanwhile != nil {
			v.meanwhile(t, s)
		}
		s.fence(t)
		for i := range s.heard {
			s.heard[i].mark = s.heard[i].wire.mark()
		}
		return ""
	})
	if !begun {
		return neither, "never began: " + r.Error
	}
	s.fence(t)
	return s.judge(t, o.Marker, r), cmp.Or(r.Error, "it was answered")
}

// run runs an attacker to its end and does what it asks for.
func (s *scene) run(t *testing.T, v vector, o orders, asked func(what string) string) report {
	t.Helper()
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe") // by this link a user who may not enter the binary's directory can run it
	cmd.Env = append(os.Environ(), attackVariable+"="+string(text))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	in := s.host
	if s.pod != nil {
		in = s.pod
	}
	attr := &syscall.SysProcAttr{Setpgid: true}
	if v.as != root {
		attr.Credential = &syscall.Credential{Uid: workloadUID, Gid: workloadUID}
		attr.AmbientCaps = capabilities[v.as]
	}
	if v.from == inUserNamespace {
		attr = userNamespace(syscall.CLONE_NEWNET)
		attr.Credential, attr.Setpgid = &syscall.Credential{}, true
	}
	if err := s.startIn(in, cmd, cmp.Or(v.cgroup, podsCgroup), attr); err != nil {
		t.Fatal(err)
	}
	s.pid = cmd.Process.Pid
	end := func() { _ = syscall.Kill(-s.pid, syscall.SIGKILL) } // and what it leaves behind
	defer end()
	late := time.AfterFunc(patience, end)
	defer late.Stop()
	var r report
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		if text := lines.Text(); !strings.HasPrefix(text, "{") {
			_, _ = io.WriteString(stdin, asked(text)+"\n") // to one that has ended meanwhile it makes no difference
		} else if err := json.Unmarshal([]byte(text), &r); err != nil {
			t.Fatal(err)
		}
	}
	if err := cmd.Wait(); err != nil {
		r.Error = strings.TrimSpace(fmt.Sprintf("%v: %s", err, stderr.String()))
	}
	return r
}

// plug connects the namespace of an attacker to the world.
func plug(t testing.TB, s *scene, path string) string {
	t.Helper()
	o, err := s.plug(path, false)
	if err != nil {
		t.Fatal(err)
	}
	s.wire.fence(t, func(f func() error) error { return inside(path, f) }, broker4)
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// startIn starts a process in a namespace and a cgroup of the world. It is created in the cgroup, so that no socket of
// it can predate its membership, and killed when this process ends.
func (w *world) startIn(n *namespace, cmd *exec.Cmd, cgroup string, attr *syscall.SysProcAttr) error {
	dir, err := os.Open(filepath.Join(w.cgroup, cgroup))
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	attr.UseCgroupFD, attr.CgroupFD, attr.Pdeathsig = true, int(dir.Fd()), syscall.SIGKILL
	cmd.SysProcAttr = attr
	return n.start(cmd)
}

// fence returns when everything sent before was heard: what is sent last is heard last.
func (s *scene) fence(t testing.TB) {
	t.Helper()
	for _, l := range s.heard {
		l.wire.fence(t, l.from.do, l.to)
	}
}

// judge tells what the broker got of an attack.
func (s *scene) judge(t *testing.T, marker string, r report) verdict {
	t.Helper()
	var byNode, byAttacker []packet
	for _, l := range s.heard {
		for _, p := range l.wire.since(l.mark) {
			has := bytes.Contains(p.payload, []byte(marker))
			switch {
			case p.fence:
			case s.isNodes(t, p):
				if has {
					byNode = append(byNode, p)
				}
			// Without a node only what the attack is about shows that it works. With one not even a SYN may come; ends of
			// connections that were cut may.
			case has, s.node != nil && !p.tail && (p.flags&tcpSYN != 0 || len(p.payload) > 0):
				byAttacker = append(byAttacker, p)
			}
		}
	}
	switch {
	case bytes.Contains(r.Got, []byte(marker)):
		t.Logf("the attacker has %q", r.Got)
		return reached
	case len(byAttacker) > 0:
		if s.node != nil {
			t.Logf("at the broker: %v", byAttacker)
		}
		return reached
	case r.Unsupported && s.node == nil:
		return lacking
	case len(byNode) == 0:
		return refused
	case !s.node.audited(t, r.PID, r.Destination):
		t.Logf("the node sent %v, but its audit does not have process %d to %s", byNode, r.PID, r.Destination)
		return neither
	}
	return intercepted
}

// isNodes tells whether a packet is of a connection of the node: from an address of the host, or within a pod from its
// loopback, and from a port that the node sends from.
func (s *scene) isNodes(t testing.TB, p packet) bool {
	return (p.from.Addr().IsLoopback() || slices.Contains(hostAddresses, p.from.Addr())) &&
		s.meter.has(t, p.from.Port())
}

var hostAddresses = []netip.Addr{host4, host6, bridgeHost4, bridgeHost6}
