package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	nrilog "github.com/containerd/nri/pkg/log"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/rs/zerolog"

	"klamm/spiffe"
)

// nriPatience bounds waiting for what must come.
const nriPatience = 10 * time.Second

// fakeEnroller is an enroller that remembers what it was asked for.
type fakeEnroller struct {
	mu              sync.Mutex
	enrolled, ended []uint64
	answer          func() error // nil: success
}

func (e *fakeEnroller) enrol(_ string, cookie uint64) error {
	if e.answer != nil {
		if err := e.answer(); err != nil {
			return err
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.enrolled = append(e.enrolled, cookie)
	return nil
}

func (e *fakeEnroller) release(cookie uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ended = append(e.ended, cookie)
}

func (e *fakeEnroller) has(cookie uint64) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Contains(e.enrolled, cookie)
}

func init() { nrilog.Set(nriLog{zerolog.Nop()}) }

// fakeRuntime is the runtime's side of NRI, as containerd has it, with these pods and containers.
type fakeRuntime struct {
	*adaptation.Adaptation
	mu         sync.Mutex // guards pods once it serves
	pods       []*api.PodSandbox
	containers []*api.Container
}

// serve starts the runtime's side.
func (r *fakeRuntime) serve(t *testing.T, socket string) *fakeRuntime {
	t.Helper()
	synchronize := func(ctx context.Context, tell adaptation.SyncCB) error {
		r.mu.Lock()
		pods := slices.Clone(r.pods)
		r.mu.Unlock()
		_, err := tell(ctx, pods, r.containers)
		return err
	}
	update := func(context.Context, []*api.ContainerUpdate) ([]*api.ContainerUpdate, error) {
		return nil, errors.New("the node must not change containers")
	}
	none := t.TempDir()
	var err error
	r.Adaptation, err = adaptation.New("containerd", "v2.4.2", synchronize, update, adaptation.WithSocketPath(socket),
		adaptation.WithPluginPath(none), adaptation.WithPluginConfigPath(none))
	if err != nil {
		t.Fatal(err)
	}
	if err = r.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Stop)
	return r
}

// run tells of a new pod. That the plugin is told as well is known when it knows the pod: the runtime counts a plugin
// in only after it has synchronized it.
func (r *fakeRuntime) run(t *testing.T, p *nri, pod *api.PodSandbox) {
	t.Helper()
	r.mu.Lock()
	r.pods = append(r.pods, pod)
	r.mu.Unlock()
	for {
		if err := r.RunPodSandbox(t.Context(), &adaptation.RunPodSandboxRequest{Pod: pod}); err != nil {
			t.Fatal(err)
		}
		if _, ok := p.Workload(pod.GetUid(), ""); ok {
			return
		}
		if t.Context().Err() != nil {
			t.Fatal("the plugin is not told of pods")
		}
	}
}

// plugin runs a plugin until the test ends.
func plugin(t *testing.T, socket string, e enroller) *nri {
	t.Helper()
	p := newNRI(socket, e, prometheus.NewRegistry(), zerolog.New(zerolog.NewTestWriter(t)))
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.run(ctx)
	}()
	t.Cleanup(func() {
		stop()
		<-done
	})
	select {
	case <-p.first:
	case <-time.After(nriPatience):
		t.Fatal("the first try has no end")
	}
	return p
}

// podWith is a pod in a network namespace.
func podWith(id, uid, name string, ns *netns) *api.PodSandbox {
	file := fmt.Sprintf("/proc/self/fd/%d", ns.file.Fd())
	return &api.PodSandbox{Id: id, Uid: uid, Namespace: "shop", Name: name,
		Linux: &api.LinuxPodSandbox{Namespaces: []*api.LinuxNamespace{{Type: "mount"}, {Type: "network", Path: file}}}}
}

func TestAPodIsEnrolledBeforeItsContainersStart(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "nri.sock")
	nsBefore, nsAfter := newTestNetns(t), newTestNetns(t)
	before, after := podWith("s1", "u1", "orders-1", nsBefore), podWith("s2", "u2", "orders-2", nsAfter)
	host := &api.PodSandbox{Id: "s3", Uid: "u3", Namespace: "kube-system", Name: "agent", Pid: uint32(os.Getpid()),
		Linux: &api.LinuxPodSandbox{Namespaces: []*api.LinuxNamespace{{Type: "mount"}}}}
	cri := (&fakeRuntime{pods: []*api.PodSandbox{before, host},
		containers: []*api.Container{{Id: "c1", PodSandboxId: "s1", Name: "app"}}}).serve(t, socket)
	var e fakeEnroller
	p := plugin(t, socket, &e)
	if s := p.status(); !s.Connected || s.Error != "" || s.Pods != 2 || s.Socket != socket {
		t.Errorf("status is %+v", s)
	}
	until(t, "the pod that was there is enrolled", func() bool { return e.has(nsBefore.cookie) })
	cri.run(t, p, after)
	if !e.has(nsAfter.cookie) {
		t.Error("the new pod was started before it was enrolled")
	}
	if own, err := ownCookie(); err != nil || e.has(own) {
		t.Error("a pod with the host's network was enrolled")
	}
	err := cri.StartContainer(t.Context(), &adaptation.StartContainerRequest{Pod: after,
		Container: &api.Container{Id: "c2", PodSandboxId: "s2", Name: "sidecar"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		uid, container string
		want           spiffe.Workload
		known          bool
	}{
		{"u1", "c1", spiffe.Workload{Namespace: "shop", Pod: "orders-1", Container: "app"}, true},
		{"u2", "c2", spiffe.Workload{Namespace: "shop", Pod: "orders-2", Container: "sidecar"}, true},
		{"u2", "c1", spiffe.Workload{Namespace: "shop", Pod: "orders-2"}, true}, // another pod's container
		{"u3", "", spiffe.Workload{Namespace: "kube-system", Pod: "agent"}, true},
		{"u4", "c1", spiffe.Workload{}, false},
		{"", "", spiffe.Workload{}, false},
	} {
		if got, known := p.Workload(test.uid, test.container); got != test.want || known != test.known {
			t.Errorf("pod %q, container %q: %+v, %v; want %+v", test.uid, test.container, got, known, test.want)
		}
	}
}

func TestWhatHasEndedIsForgotten(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "nri.sock")
	nsOld, nsNew := newTestNetns(t), newTestNetns(t)
	old, restarted, other := podWith("s1", "u1", "orders-1", nsOld), podWith("s2", "u1", "orders-1", nsNew),
		podWith("s3", "u3", "orders-3", nsNew)
	cri := (&fakeRuntime{pods: []*api.PodSandbox{old, other}, containers: []*api.Container{
		{Id: "c1", PodSandboxId: "s1", Name: "app"}, {Id: "c3", PodSandboxId: "s3", Name: "app"}}}).serve(t, socket)
	var e fakeEnroller
	p := plugin(t, socket, &e)
	until(t, "the pod that was there is enrolled", func() bool { return e.has(nsOld.cookie) })
	cri.run(t, p, podWith("s9", "u9", "last", nsNew)) // from here on the plugin is told all
	cri.run(t, p, restarted)
	for range 2 { // stopped, and stopped again
		if err := cri.StopPodSandbox(t.Context(), &adaptation.StopPodSandboxRequest{Pod: old}); err != nil {
			t.Fatal(err)
		}
	}
	if err := cri.RemovePodSandbox(t.Context(), &adaptation.RemovePodSandboxRequest{Pod: old}); err != nil {
		t.Fatal(err)
	}
	if want := []uint64{nsOld.cookie}; !slices.Equal(e.ended, want) {
		t.Errorf("ended are %d, want %d", e.ended, want)
	}
	if w, ok := p.Workload("u1", "c1"); !ok || w.Pod != "orders-1" || w.Container != "" {
		t.Errorf("the pod that was restarted is %+v, %v", w, ok)
	}
	remove := &adaptation.RemoveContainerRequest{Pod: other, Container: cri.containers[1]}
	if err := cri.RemoveContainer(t.Context(), remove); err != nil {
		t.Fatal(err)
	}
	if w, ok := p.Workload("u3", "c3"); !ok || w.Container != "" {
		t.Errorf("the pod whose container was removed is %+v, %v", w, ok)
	}
	if err := cri.RemovePodSandbox(t.Context(), &adaptation.RemovePodSandboxRequest{Pod: restarted}); err != nil {
		t.Fatal(err)
	}
	if w, ok := p.Workload("u1", "c1"); ok {
		t.Errorf("a pod that was removed is still %+v", w)
	}
	if p.status().Pods != 2 || len(p.containers) != 0 || len(p.byUID) != 2 {
		t.Errorf("it still knows %+v", p.pods)
	}
}

func TestAPodThatCannotBeEnrolledStartsAllTheSame(t *testing.T) {
	ns := newTestNetns(t)
	hang := make(chan struct{})
	defer close(hang)
	for name, answer := range map[string]func() error{
		"it fails": func() error { return errors.New("no memory") },
		"it hangs": func() error {
			<-hang
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "nri.sock")
			cri := new(fakeRuntime).serve(t, socket)
			e := &fakeEnroller{answer: answer}
			p := plugin(t, socket, e)
			cri.run(t, p, podWith("s1", "u1", "orders-1", ns))
			cri.run(t, p, podWith("s2", "u2", "orders-2", ns))
			if !p.status().Connected {
				t.Error("the runtime has disconnected the plugin")
			}
			if n := testutil.ToFloat64(p.outcomes.WithLabelValues("failed")); n != 2 {
				t.Errorf("%v failures are counted, want 2", n)
			}
		})
	}
}

func TestARuntimeThatComesLaterIsFound(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "nri.sock")
	var e fakeEnroller
	p := plugin(t, socket, &e)
	if s := p.status(); s.Connected || !strings.Contains(s.Error, "no such file") {
		t.Errorf("without a runtime: %+v", s)
	}
	ns := newTestNetns(t)
	there := podWith("s1", "u1", "orders-1", ns)
	(&fakeRuntime{pods: []*api.PodSandbox{there}}).serve(t, socket)
	until(t, "it is connected", func() bool { return p.status().Connected })
	until(t, "the pod is enrolled", func() bool { return e.has(ns.cookie) })
}

func TestALostConnectionIsMadeAnew(t *testing.T) {
	adaptation.SetPluginRequestTimeout(enrolTimeout / 10)
	defer adaptation.SetPluginRequestTimeout(adaptation.DefaultPluginRequestTimeout)
	socket := filepath.Join(t.TempDir(), "nri.sock")
	hang := make(chan struct{})
	defer close(hang)
	var tries atomic.Int32
	e := &fakeEnroller{answer: func() error {
		if tries.Add(1) == 1 {
			<-hang // the runtime loses patience and disconnects
			return errors.New("too late")
		}
		return nil
	}}
	ns := newTestNetns(t)
	slow := podWith("s1", "u1", "orders-1", ns)
	cri := new(fakeRuntime).serve(t, socket)
	p := plugin(t, socket, e)
	cri.run(t, p, slow)
	until(t, "the pod is enrolled by the next connection", func() bool { return e.has(ns.cookie) })
	if !p.status().Connected {
		t.Error("it is not connected")
	}
}

func TestARuntimeThatSaysNothingIsLeft(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "nri.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p := newNRI(socket, new(fakeEnroller), prometheus.NewRegistry(), zerolog.Nop())
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.run(ctx)
	}()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stop()
	select {
	case <-done:
	case <-time.After(nriPatience):
		t.Error("the plugin waits for the runtime for ever")
	}
}

func TestThePodsOfARuntimeAreBounded(t *testing.T) {
	p := newPods()
	for i := range maxPods + 2 {
		if err := p.add(fmt.Sprint("s", i), sandbox{uid: fmt.Sprint("u", i)}); (err != nil) != (i >= maxPods) {
			t.Fatalf("pod %d: %v", i+1, err)
		}
	}
	for i := range maxContainers + 2 {
		if err := p.addContainer(fmt.Sprint("c", i), container{sandbox: "s1"}); (err != nil) != (i >= maxContainers) {
			t.Fatalf("container %d: %v", i+1, err)
		}
	}
	if p.remove("s1"); len(p.containers) != 0 {
		t.Errorf("%d containers outlive their pod", len(p.containers))
	}
}

func TestTheNetworkNamespaceOfAPodIsFound(t *testing.T) {
	there, missing := netnsPath(os.Getpid()), "/run/netns/missing"
	network := func(path string) []*api.LinuxNamespace {
		return []*api.LinuxNamespace{{Type: "pid"}, {Type: "network", Path: path}}
	}
	for name, test := range map[string]struct {
		namespaces []*api.LinuxNamespace
		pid        int
		want, err  string
	}{
		"a file":                               {network(there), 0, there, ""},
		"a file out of sight, but a process":   {network(missing), os.Getpid(), there, ""},
		"a file out of sight and no process":   {network(missing), 0, "", missing},
		"no file, but a process":               {network(""), os.Getpid(), there, ""},
		"a process and no list of namespaces":  {nil, os.Getpid(), there, ""},
		"nothing":                              {nil, 0, "", "none of"},
		"the host's, for there is none of its": {[]*api.LinuxNamespace{{Type: "mount"}}, os.Getpid(), "", ""},
	} {
		got, err := sandboxNetns(&api.PodSandbox{Pid: uint32(test.pid),
			Linux: &api.LinuxPodSandbox{Namespaces: test.namespaces}})
		if got != test.want || (err != nil) != (test.err != "") || err != nil && !strings.Contains(err.Error(), test.err) {
			t.Errorf("%s: %q, %v; want %q", name, got, err, test.want)
		}
	}
}
