package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"klamm/test/kafka"
	"klamm/test/kubernetes"
)

type check struct {
	name string
	run  func(context.Context, *rig) error
}

// checks are all of them, in their order.
func checks() []check {
	all := []check{{"without klamm a pod's own connection reaches the broker", aPodReachesTheBroker}}
	for _, a := range attacks {
		all = append(all, check{"without klamm it works: " + a.name, a.works})
	}
	all = append(all,
		check{"klamm starts on a node with pods", starts},
		check{"a pod's connection older than klamm ends", olderConnectionsEnd},
		check{"the first connect of a pod passes, in ten pods at a time", firstConnectsPass})
	for _, c := range clients {
		all = append(all,
			check{c.name + " produces", c.produces},
			check{c.name + " consumes in a group", c.consumes},
			check{c.name + " sees only what is permitted", c.seesOnlyWhatIsPermitted},
			check{c.name + " is refused a forbidden topic in Kafka's terms", c.isRefused})
	}
	all = append(all,
		check{"the audit names namespace, pod, uid and container", auditNamesThePod},
		check{"a pod of another name has no rights", strangerHasNoRights},
		check{"a pod in the node's own network is enforced", hostNetworkPodIsEnforced})
	for _, a := range attacks {
		all = append(all, check{"nothing reaches the broker: " + a.name, a.fails})
	}
	return append(all,
		check{"deleted pods leave nothing on the node", deletedPodsLeaveNothing},
		check{"a container that restarts in its pod is enforced", restartedContainerIsEnforced},
		check{"klamm stops and starts while a pod runs", restarts(syscall.SIGTERM)},
		check{"klamm is killed and starts while a pod runs", restarts(syscall.SIGKILL)},
		check{"containerd restarts: the first connect still passes", containerdRestarts},
		check{"no other packet of a pod reached the broker", nothingWentAround})
}

func aPodReachesTheBroker(ctx context.Context, r *rig) error {
	command := fmt.Sprintf("echo hello | kcat -P -b %s -t %s", r.broker(), payouts)
	o, err := r.node.API.Run(ctx, kubernetes.Pod{Name: "direct", Command: command})
	if err != nil {
		return err
	}
	packets, err := r.wire.from(o.Status.PodIP)
	if err == nil && (o.Code != 0 || packets == 0) {
		return fmt.Errorf("%d packets came to the broker: %v", packets, o)
	}
	return err
}

// older is a pod that is connected to the broker before klamm starts, and beat one that connects again and again.
const (
	older = clientPods + "-older"
	beat  = clientPods + "-beat"
)

func starts(ctx context.Context, r *rig) error {
	consumer := fmt.Sprintf("kcat -C -b %s -t %s", r.broker(), orders)
	list := fmt.Sprintf("kcat -L -m 2 -b %s >/dev/null 2>&1", r.broker())
	lister := "while :; do " + list + " && echo yes || echo no; sleep 0.2; done"
	for _, p := range []kubernetes.Pod{{Name: older, Command: consumer}, {Name: beat, Command: lister}} {
		if err := r.node.API.Start(ctx, p); err != nil {
			return err
		}
		if _, err := r.node.API.AwaitPod(ctx, p.Name, "to run", (*kubernetes.State).Running); err != nil {
			return err
		}
	}
	err := kubernetes.Await(ctx, "the connection of "+older, func() (bool, error) {
		n, err := podConnections()
		return n > 0, err
	})
	if err = errors.Join(err, r.configureKlamm(), r.startKlamm(ctx)); err != nil {
		r.missing = errors.New("klamm did not start")
	}
	return err
}

// podConnections are the broker's connections, established, whose peer is a pod. They are of this network namespace.
func podConnections() (int, error) {
	sockets, err := netlink.SocketDiagTCP(unix.AF_INET)
	if err != nil {
		return 0, fmt.Errorf("list TCP sockets: %w", err)
	}
	n := 0
	for _, s := range sockets {
		peer := s.ID.Destination.String()
		served := s.ID.SourcePort == kafka.PlaintextPort && s.State == netlink.TCP_ESTABLISHED
		if served && peer != kubernetes.NodeIP && peer != kubernetes.BrokerIP {
			n++
		}
	}
	return n, nil
}

func olderConnectionsEnd(ctx context.Context, r *rig) error {
	err := kubernetes.Await(ctx, "the end of pods' connections at the broker", func() (bool, error) {
		n, err := podConnections()
		return n == 0, err
	})
	var lost error
	_, r.around, _, lost = r.wire.seen()
	return errors.Join(err, lost)
}

const refusedNotEnrolled = "refused_not_enrolled" // of klamm's counters

// firstConnectsPass: the first system call that these containers make on a socket is the connect, to an address: no
// look-up of a name has told anyone that they are there.
func firstConnectsPass(ctx context.Context, r *rig) error {
	before, err := r.status(ctx)
	if err != nil {
		return err
	}
	failures := make([]error, 10)
	var all sync.WaitGroup
	for i := range failures {
		all.Go(func() {
			command := fmt.Sprintf("exec nc -w 5 %s %d </dev/null", kubernetes.BrokerIP, kafka.PlaintextPort)
			o, err := r.node.API.Run(ctx, kubernetes.Pod{Name: fmt.Sprintf("%s-first-%d", clientPods, i), Command: command})
			if err == nil && o.Code != 0 {
				err = fmt.Errorf("pod %d: %v", i, o)
			}
			failures[i] = err
		})
	}
	all.Wait()
	after, err := r.status(ctx)
	if n := after.Counters[refusedNotEnrolled] - before.Counters[refusedNotEnrolled]; err == nil && n != 0 {
		err = fmt.Errorf("%d connects were refused in network namespaces that were not enrolled", n)
	}
	return errors.Join(errors.Join(failures...), err)
}

func auditNamesThePod(ctx context.Context, r *rig) error {
	const name = clientPods + "-named"
	command := fmt.Sprintf("echo x | kcat -P -b %s -t %s", r.broker(), orders)
	o, err := r.node.API.Run(ctx, kubernetes.Pod{Name: name, Command: command})
	if err != nil {
		return err
	}
	lines, err := r.audit(o.Metadata.UID)
	if err != nil {
		return err
	}
	if len(lines) == 0 {
		return fmt.Errorf("no line of the audit has the uid %s of the pod: %v", o.Metadata.UID, o)
	}
	want := auditLine{Pod: name, Namespace: kubernetes.Namespace, UID: o.Metadata.UID, ID: o.ContainerID(),
		Container: "main", SPIFFE: "spiffe://k8s.test/client"}
	for _, line := range lines {
		got := line
		got.Event, got.Verdict = "", ""
		if got != want {
			return fmt.Errorf("the audit says %+v, want %+v", got, want)
		}
	}
	if !slices.ContainsFunc(lines, func(l auditLine) bool { return l.Event == "operation" && l.Verdict == "allow" }) {
		return fmt.Errorf("no line of the audit allows it an operation: %+v", lines)
	}
	return nil
}

func strangerHasNoRights(ctx context.Context, r *rig) error {
	command := fmt.Sprintf("kcat -L -m 5 -b %s 2>&1", r.broker())
	o, err := r.node.API.Run(ctx, kubernetes.Pod{Name: "stranger", Command: command})
	if err == nil && (strings.Contains(o.Log, orders) || strings.Contains(o.Log, payouts)) {
		return fmt.Errorf("it sees topics: %v", o)
	}
	return err
}

// hostNetworkPodIsEnforced: at the wire its packets look like klamm's, so the audit has to tell.
func hostNetworkPodIsEnforced(ctx context.Context, r *rig) error {
	command := fmt.Sprintf("kcat -L -m 5 -b %s 2>&1", r.broker())
	o, err := r.node.API.Run(ctx, kubernetes.Pod{Name: clientPods + "-of-the-node", HostNetwork: true, Command: command})
	if err != nil {
		return err
	}
	lines, err := r.audit(o.Metadata.UID)
	if err == nil && (len(lines) == 0 || !strings.Contains(o.Log, orders) || strings.Contains(o.Log, payouts)) {
		return fmt.Errorf("%d lines of the audit have its uid: %v", len(lines), o)
	}
	return err
}

func deletedPodsLeaveNothing(ctx context.Context, r *rig) error {
	if _, err := r.node.API.Run(ctx, kubernetes.Pod{Name: clientPods + "-leak", Command: "exit 0"}); err != nil {
		return err
	}
	before, err := r.leftovers(ctx)
	if err != nil {
		return err
	}
	consumer := fmt.Sprintf("kcat -C -b %s -t %s", r.broker(), orders)
	failures := make([]error, 5)
	var all sync.WaitGroup
	for i := range failures {
		all.Go(func() {
			p := kubernetes.Pod{Name: fmt.Sprintf("%s-leak-%d", clientPods, i), Command: consumer}
			failures[i] = r.node.API.Start(ctx, p)
			if failures[i] == nil {
				_, failures[i] = r.node.API.AwaitPod(ctx, p.Name, "to run", (*kubernetes.State).Running)
			}
		})
	}
	all.Wait()
	if err := errors.Join(failures...); err != nil {
		return err
	}
	during, err := r.leftovers(ctx)
	if err != nil {
		return err
	}
	for i := range failures {
		all.Go(func() { failures[i] = r.node.API.Remove(ctx, fmt.Sprintf("%s-leak-%d", clientPods, i)) })
	}
	all.Wait()
	if err := errors.Join(failures...); err != nil {
		return err
	}
	var after leftovers
	err = kubernetes.Await(ctx, "the end of what the pods had", func() (_ bool, err error) {
		after, err = r.leftovers(ctx)
		return after.within(before), err
	})
	if err != nil {
		return fmt.Errorf("before %+v, with five pods %+v, now %+v: %w", before, during, after, err)
	}
	if during.within(before) {
		return fmt.Errorf("five pods made no difference to %+v: it does not measure", before)
	}
	return nil
}

func restartedContainerIsEnforced(ctx context.Context, r *rig) error {
	const name = clientPods + "-again"
	p := kubernetes.Pod{Name: name, Restart: "Always", Command: fmt.Sprintf("kcat -L -m 5 -b %s; sleep 1", r.broker())}
	if err := r.node.API.Start(ctx, p); err != nil {
		return err
	}
	_, err := r.node.API.AwaitPod(ctx, name, "to restart", func(s *kubernetes.State) bool {
		return len(s.Status.ContainerStatuses) > 0 && s.Status.ContainerStatuses[0].RestartCount > 0 && s.Running()
	})
	if err != nil {
		return err
	}
	return errors.Join(kubernetes.Await(ctx, "its list of topics", func() (bool, error) {
		log, err := r.node.API.Log(ctx, name)
		if strings.Contains(log, payouts) {
			return false, fmt.Errorf("it sees %s", payouts)
		}
		return strings.Contains(log, orders), err
	}), r.node.API.Remove(ctx, name))
}

// restarts ends klamm in one way and starts it again. Meanwhile the pod beat is refused, and so is a pod that starts
// then; afterwards beat is served.
func restarts(how syscall.Signal) func(context.Context, *rig) error {
	return func(ctx context.Context, r *rig) error {
		if err := r.awaitBeat(ctx, "yes"); err != nil {
			return err
		}
		if err := r.node.Stop("klamm", how); err != nil {
			return err
		}
		err := errors.Join(r.awaitBeat(ctx, "no"), r.newPodIsRefused(ctx))
		return errors.Join(err, r.startKlamm(ctx), r.awaitBeat(ctx, "yes"))
	}
}

func (r *rig) newPodIsRefused(ctx context.Context) error {
	command := fmt.Sprintf("nc -w 5 %s %d </dev/null", kubernetes.BrokerIP, kafka.PlaintextPort)
	o, err := r.node.API.Run(ctx, kubernetes.Pod{Name: clientPods + "-meanwhile", Command: command})
	if err == nil && o.Code == 0 {
		return fmt.Errorf("a pod that started without klamm was served: %v", o)
	}
	return err
}

// awaitBeat waits until the pod beat says, from now on, that it is served ("yes") or not ("no").
func (r *rig) awaitBeat(ctx context.Context, what string) error {
	count := func() (int, error) {
		log, err := r.node.API.Log(ctx, beat)
		return strings.Count(log, what+"\n"), err
	}
	before, err := count()
	if err != nil {
		return err
	}
	// One may have been said for what was before.
	return kubernetes.Await(ctx, beat+" to say "+what, func() (bool, error) {
		n, err := count()
		return n > before+1, err
	})
}

func containerdRestarts(ctx context.Context, r *rig) error {
	if err := r.node.Stop("containerd", syscall.SIGTERM); err != nil {
		return err
	}
	if err := r.node.Start("containerd", "node", kubernetes.Programs["containerd"]); err != nil {
		return err
	}
	err := kubernetes.Await(ctx, "a pod to start", func() (bool, error) {
		const name = "warm-up"
		err := r.node.API.Start(ctx, kubernetes.Pod{Name: name, Command: "exit 0"})
		if err != nil && !kubernetes.Is(err, http.StatusConflict) {
			return false, err
		}
		s, err := r.node.API.State(ctx, name)
		if err != nil {
			return false, err
		}
		_, ended := s.Ended()
		return ended, nil
	})
	return errors.Join(err, firstConnectsPass(ctx, r))
}

// nothingWentAround: no packet came since the start of klamm but those that a check has told of, and those of attacks.
func nothingWentAround(_ context.Context, r *rig) error {
	node, others, who, err := r.wire.seen()
	switch {
	case err != nil:
		return err
	case node == 0:
		return errors.New("the wire has seen nothing of the node either: it does not measure")
	case others != r.around:
		return fmt.Errorf("%d packets came; all sources: %v", others-r.around, who)
	}
	return nil
}
