package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"sync"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"klamm/spiffe"
)

const (
	// enrolTimeout bounds an enrolment that a container's start waits for. The runtime disconnects an NRI plugin that
	// takes 2s for an answer (containerd: plugin_request_timeout).
	enrolTimeout = 500 * time.Millisecond
	// nriStartTimeout bounds getting registered, for which the runtime has 5s (plugin_registration_timeout).
	nriStartTimeout = 10 * time.Second
	// nriMinBackoff is the pause before the runtime is tried again. It doubles until nriMaxBackoff.
	nriMinBackoff, nriMaxBackoff = 100 * time.Millisecond, 5 * time.Second
)

// enroller takes network namespaces under enforcement.
type enroller interface {
	// enrol returns when connects are redirected in the network namespace of a path, if it has the cookie (0: any). It
	// is no error if they were before.
	enrol(path string, cookie uint64) error
	// release says that the namespace is about to end.
	release(cookie uint64)
}

// nri is a plugin of the container runtime (containerd, CRI-O). Through its Node Resource Interface the runtime tells
// of a pod before it starts the pod's containers, and waits for the answer: their first connect is redirected. The
// plugin changes nothing in a pod and fails none, for the kernel refuses what is not enrolled.
type nri struct {
	socket   string
	enroller enroller
	log      zerolog.Logger
	outcomes *prometheus.CounterVec
	first    chan struct{} // closed when the runtime has told of its pods, or a try to have it tell has failed
	begin    func()        // closes first

	mu  sync.Mutex // guards what follows
	err error      // why the runtime does not tell of its pods; nil while it does
	pods
}

// NRIStatus is how it stands with the container runtime.
type NRIStatus struct {
	Socket    string `json:"socket"`
	Connected bool   `json:"connected"`       // the runtime tells of its pods
	Error     string `json:"error,omitempty"` // why it does not
	Pods      int    `json:"pods"`
}

var errNotConnected = errors.New("not connected yet")

// newNRI is a plugin for the runtime that listens on socket: see run.
func newNRI(socket string, e enroller, metrics prometheus.Registerer, log zerolog.Logger) *nri {
	r := &nri{socket: socket, enroller: e, log: log.With().Str("nri", socket).Logger(), first: make(chan struct{}),
		outcomes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "klamm_nri_enrolments_total",
			Help: "Network namespaces that the container runtime told of, by outcome."}, []string{"outcome"}),
		err: errNotConnected, pods: newPods()}
	r.begin = sync.OnceFunc(func() { close(r.first) })
	metrics.MustRegister(r.outcomes, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "klamm_nri_connected",
		Help: "1 while the container runtime tells of its pods."}, func() float64 {
		if r.status().Connected {
			return 1
		}
		return 0
	}))
	return r
}

// run keeps a connection to the runtime until ctx ends.
func (r *nri) run(ctx context.Context) {
	for backoff := nriMinBackoff; ; backoff = min(2*backoff, nriMaxBackoff) {
		err := r.session(ctx)
		if ctx.Err() != nil {
			return
		}
		if r.disconnected(err) {
			backoff = nriMinBackoff
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(backoff):
		}
	}
}

// session is one connection to the runtime, from its beginning to its end, and why it ended.
func (r *nri) session(ctx context.Context) error {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", r.socket)
	if err != nil {
		return fmt.Errorf("connect to the container runtime: %w", err)
	}
	defer func() { _ = conn.Close() }()
	present := make(chan map[string]sandbox, 1)
	s, err := stub.New(&nriPlugin{r, present}, stub.WithConnection(conn), stub.WithPluginName("klamm"),
		stub.WithPluginIdx("00"), stub.WithLogger(nriLog{r.log}))
	if err != nil {
		return fmt.Errorf("make an NRI plugin: %w", err)
	}
	started := make(chan error, 1)
	go func() { started <- s.Start(ctx) }()
	select {
	case err = <-started:
		if err != nil {
			return fmt.Errorf("register with the container runtime: %w", err)
		}
	case <-time.After(nriStartTimeout): // Start does not notice a runtime that goes away between two of its steps
		return fmt.Errorf("the container runtime did not register the node within %s", nriStartTimeout)
	case <-ctx.Done():
		return ctx.Err()
	}
	unwatch := context.AfterFunc(ctx, s.Stop)
	defer unwatch()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.Wait()
	}()
	for {
		select {
		case <-ended:
			return errors.New("the container runtime ended the connection")
		case there := <-present:
			for id, s := range there {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				r.enrol(id, s)
			}
		}
	}
}

// connected notes that the runtime tells of its pods.
func (r *nri) connected(told pods) {
	r.mu.Lock()
	r.err, r.pods = nil, told
	r.mu.Unlock()
	r.begin()
	r.log.Info().Int("pods", len(told.sandboxes)).Msg("the container runtime tells of its pods")
}

// disconnected notes that the runtime does not tell of its pods, and returns whether it did before.
func (r *nri) disconnected(why error) bool {
	r.mu.Lock()
	was := r.err
	r.err = why
	r.mu.Unlock()
	r.begin()
	if was == nil || errors.Is(was, errNotConnected) {
		r.log.Warn().Err(why).Msg("the container runtime does not tell of its pods: the first connects of new ones are " +
			"refused until the node has found them by itself")
	}
	return was == nil
}

// status is how it stands.
func (r *nri) status() NRIStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := NRIStatus{Socket: r.socket, Connected: r.err == nil, Pods: len(r.sandboxes)}
	if r.err != nil {
		s.Error = r.err.Error()
	}
	return s
}

// Workload is what the runtime calls a container: see spiffe.Workloads.
func (r *nri) Workload(podUID, containerID string) (spiffe.Workload, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.workload(podUID, containerID)
}

// enrol takes a pod's network namespace under enforcement. It waits no longer than enrolTimeout.
func (r *nri) enrol(id string, s sandbox) {
	if s.netns == "" {
		return
	}
	done := make(chan error, 1)
	go func() { done <- r.enrolNetns(id, s.netns) }()
	var err error
	select {
	case err = <-done:
	case <-time.After(enrolTimeout):
		err = fmt.Errorf("enrolment in %s takes longer than %s", s.netns, enrolTimeout)
	}
	if err != nil {
		r.failed(s, err)
		return
	}
	r.outcomes.WithLabelValues("enrolled").Inc()
}

func (r *nri) enrolNetns(id, file string) error {
	ns, err := openNetns(file)
	if err != nil {
		return err
	}
	defer func() { _ = ns.Close() }()
	if err := r.enroller.enrol(file, ns.cookie); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.enrolled(id, ns.cookie)
	return nil
}

func (r *nri) failed(s sandbox, err error) {
	r.outcomes.WithLabelValues("failed").Inc()
	r.log.Error().Err(err).Str("pod_namespace", s.namespace).Str("pod", s.pod).Str("pod_uid", s.uid).
		Msg("the pod is not enrolled: its connects are refused until the node has found it by itself")
}

// sandboxNetns is a file of the network namespace of a pod, none where that is the host's. The file that the runtime
// names may lie in a mount namespace of its own; then that of the pod's first process does.
func sandboxNetns(p *api.PodSandbox) (string, error) {
	namespaces := p.GetLinux().GetNamespaces()
	var files []string
	own := len(namespaces) == 0 // a runtime that lists none has told nothing
	for _, n := range namespaces {
		if n.GetType() == "network" {
			own = true
			files = append(files, n.GetPath())
		}
	}
	if !own {
		return "", nil
	}
	files = append(files, netnsPath(int(p.GetPid())))
	for _, file := range files {
		if _, err := os.Stat(file); err == nil {
			return file, nil
		}
	}
	return "", fmt.Errorf("none of %q, which are what the container runtime tells of the pod's network namespace, "+
		"is there: mount the host's /run/netns for the node, or run it in the host's pid namespace", files)
}

// sandboxOf reads what the runtime says of a pod.
func (r *nri) sandboxOf(p *api.PodSandbox) sandbox {
	s := sandbox{uid: p.GetUid(), namespace: p.GetNamespace(), pod: p.GetName()}
	var err error
	if s.netns, err = sandboxNetns(p); err != nil {
		r.failed(s, err)
	}
	return s
}

func containerOf(c *api.Container) container { return container{c.GetPodSandboxId(), c.GetName()} }

// nriPlugin is what the runtime calls in one session. Nothing it asks for is answered with an error, which would fail
// the pod.
type nriPlugin struct {
	*nri
	present chan<- map[string]sandbox // the pods that were there when the session began
}

// Synchronize is told all pods and containers once, when the session begins. The runtime does not wait for these pods'
// enrolment: their number times its duration may be more than it has time for.
func (p *nriPlugin) Synchronize(
	_ context.Context, sandboxes []*api.PodSandbox, containers []*api.Container,
) ([]*api.ContainerUpdate, error) {
	told := newPods()
	var errs []error
	for _, s := range sandboxes {
		errs = append(errs, told.add(s.GetId(), p.sandboxOf(s)))
	}
	for _, c := range containers {
		errs = append(errs, told.addContainer(c.GetId(), containerOf(c)))
	}
	p.unknown(errors.Join(errs...))
	there := maps.Clone(told.sandboxes)
	p.connected(told)
	p.present <- there
	return nil, nil
}

// RunPodSandbox is told of a pod whose network is ready and which has no containers yet.
func (p *nriPlugin) RunPodSandbox(_ context.Context, s *api.PodSandbox) error {
	told := p.sandboxOf(s)
	p.mu.Lock()
	err := p.add(s.GetId(), told)
	p.mu.Unlock()
	p.unknown(err)
	p.enrol(s.GetId(), told)
	return nil
}

// StartContainer is told of a container before its first process runs.
func (p *nriPlugin) StartContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	p.mu.Lock()
	err := p.addContainer(c.GetId(), containerOf(c))
	p.mu.Unlock()
	p.unknown(err)
	return nil
}

// RemoveContainer is told of a container that is no more.
func (p *nriPlugin) RemoveContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.containers, c.GetId())
	return nil
}

// StopPodSandbox is told of a pod whose containers have ended and whose network is about to.
func (p *nriPlugin) StopPodSandbox(_ context.Context, s *api.PodSandbox) error {
	p.mu.Lock()
	was := p.remove(s.GetId())
	p.mu.Unlock()
	if was.cookie != 0 {
		p.enroller.release(was.cookie)
	}
	return nil
}

// RemovePodSandbox is told of a pod that is no more, stopped before or not.
func (p *nriPlugin) RemovePodSandbox(ctx context.Context, s *api.PodSandbox) error {
	return p.StopPodSandbox(ctx, s)
}

func (p *nriPlugin) unknown(err error) {
	if err != nil {
		p.log.Warn().Err(err).Msg("attestation by names of pods does not know all of them")
	}
}

// nriLog takes the library's log: what keeps it from working is returned to session as well.
type nriLog struct{ zerolog.Logger }

func (nriLog) Debugf(context.Context, string, ...any) {}
func (nriLog) Infof(context.Context, string, ...any)  {}

func (l nriLog) Warnf(_ context.Context, format string, args ...any) { l.Debug().Msgf(format, args...) }

func (l nriLog) Errorf(_ context.Context, format string, args ...any) {
	l.Debug().Msgf(format, args...)
}
