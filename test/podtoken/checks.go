// Package podtoken checks, on a real Kubernetes node, whom the service account tokens of pods are taken for: in pods
// that have one, in pods that have another's, in those that lead astray who reads it, and after a pod was deleted. The
// kernel's facts about processes are read from /proc here; all else is the product's own.
package podtoken

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"klamm/node"
	"klamm/spiffe"
	"klamm/test/kubernetes"
)

// Check is one of what has to be so. It tells what it measured, if anything.
type Check struct {
	Name string
	Run  func(ctx context.Context) (measured string, err error)
}

const (
	audience = "klamm"
	account  = "orders"
	subject  = "system:serviceaccount:" + kubernetes.Namespace + ":" + account
	holder   = "token-holder" // the pod with a token

	// revoked bounds how long the token of a deleted pod counts.
	revoked = 15 * time.Second
	// every is how often tokens are reviewed, as the node's configuration has it by default.
	every = 3 * time.Second
	// stale is for how long a reviewed token counts while the API server does not answer.
	stale = 5 * time.Second
)

// The ways by which a token is proven.
const (
	offline = "by the issuer's keys"
	review  = "by TokenReview"
)

// rig is what the checks have together.
type rig struct {
	node      *kubernetes.Node
	processes *spiffe.Processes
	tokens    *spiffe.Tokens
	attestors map[string]*spiffe.Attestor // by way
	reviews   *spiffe.Review
}

// Checks are all of them, in their order, each on what the ones before it left. The last ones hold up the kubelet and
// the API server for some seconds.
func Checks(n *kubernetes.Node) []Check {
	r := &rig{node: n, attestors: map[string]*spiffe.Attestor{}}
	checks := []Check{
		{"the API server lets the node review tokens, and read its keys", r.open},
		{"without the right to review tokens that is said", r.forbidden},
		{"a pod's token is evidence of its service account", r.isEvidence},
		{"a token for another audience is none", r.otherAudience},
		{"another pod's token is none", r.copied},
	}
	for _, t := range tricks {
		checks = append(checks, Check{"nothing of the host is read through " + t.name, t.reads(r)})
	}
	return append(checks,
		Check{"while the API server hangs a token counts for as long as it may", r.apiServerHangs},
		Check{"a deleted pod's token ends in time", r.deleted})
}

// open makes accounts and rights, and the product's part.
func (r *rig) open(ctx context.Context) (string, error) {
	binding := "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\nmetadata: {name: klamm}\n" +
		"roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: %q}\n" +
		"subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: klamm}]\n"
	accounts := "/api/v1/namespaces/" + kubernetes.Namespace + "/serviceaccounts"
	for _, object := range []struct{ path, yaml string }{
		{"/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", fmt.Sprintf(binding, "system:auth-delegator")},
		{accounts, "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: " + account + "}\n"},
	} {
		_, err := r.node.API.Call(ctx, http.MethodPost, object.path, object.yaml)
		if err != nil && !kubernetes.Is(err, http.StatusConflict) {
			return "", err
		}
	}
	bearer, err := r.ownToken(ctx, accounts)
	if err != nil {
		return "", err
	}
	if err := errors.Join(r.node.Authority.Client("klamm", "klamm", ""),
		r.node.Authority.Client("stranger", "stranger", "")); err != nil {
		return "", err
	}
	ca := filepath.Join(r.node.Dir, "ca.crt")
	keys := spiffe.NewKeySet(spiffe.KeySetOptions{Issuer: kubernetes.URL, Remote: spiffe.Remote{CA: ca, Bearer: bearer},
		Refresh: time.Hour, MaxStale: time.Hour})
	if r.tokens, err = spiffe.NewTokens(spiffe.Issuer{Issuer: kubernetes.URL, Keys: keys, Skew: time.Second,
		MaxAge: time.Hour}); err != nil {
		return "", err
	}
	cgroups, err := node.Cgroup2Mount()
	if err != nil {
		return "", err
	}
	r.processes, r.reviews = spiffe.NewProcesses(procfs{}, cgroups, nil), r.reviewsAs("klamm")
	for way, o := range map[string]spiffe.KubernetesOptions{
		offline: {Issuer: kubernetes.URL, Node: kubernetes.Name}, review: {Review: r.reviews}} {
		o.Path, o.Audience = kubernetes.TokenFile, audience
		source, err := spiffe.NewKubernetes(r.tokens, r.processes, o)
		if err != nil {
			return "", err
		}
		r.attestors[way] = spiffe.NewAttestor(r.processes, source) // it ends with this program
	}
	return "", errors.Join(r.reviews.Probe(ctx, audience), keys.Refresh(ctx))
}

// ownToken is a file with a token of an account without any rights of its own.
func (r *rig) ownToken(ctx context.Context, accounts string) (string, error) {
	answer, err := r.node.API.Call(ctx, http.MethodPost, accounts+"/default/token",
		"apiVersion: authentication.k8s.io/v1\nkind: TokenRequest\nspec: {expirationSeconds: 3600}\n")
	if err != nil {
		return "", err
	}
	_, token, _ := strings.Cut(string(answer), `"token":"`)
	token, _, _ = strings.Cut(token, `"`)
	file := filepath.Join(r.node.Dir, "klamm.token")
	return file, os.WriteFile(file, []byte(token), 0o600)
}

func (r *rig) reviewsAs(user string) *spiffe.Review {
	return spiffe.NewReview(spiffe.ReviewOptions{Server: kubernetes.URL, Every: every, MaxStale: stale,
		Remote: spiffe.Remote{CA: filepath.Join(r.node.Dir, "ca.crt"), Cert: filepath.Join(r.node.Dir, user+".crt"),
			Key: filepath.Join(r.node.Dir, user+".key")}})
}

func (r *rig) forbidden(ctx context.Context) (string, error) {
	err := r.reviewsAs("stranger").Probe(ctx, audience)
	if err == nil || !strings.Contains(err.Error(), "403 Forbidden") {
		return "", fmt.Errorf("it was told %w", errors.Join(err, errors.New("no refusal")))
	}
	return "", nil
}

// start starts a pod and returns the process of its container.
func (r *rig) start(ctx context.Context, p kubernetes.Pod) (pid uint32, err error) {
	if err := r.node.API.Start(ctx, p); err != nil {
		return 0, err
	}
	s, err := r.node.API.AwaitPod(ctx, p.Name, "to run", (*kubernetes.State).Running)
	if err != nil {
		return 0, err
	}
	// What it runs first is the shell, which the command is to replace.
	err = kubernetes.Await(ctx, "the process of "+p.Name, func() (bool, error) {
		pid, err = processOf(s.ContainerID(), "sleep")
		return pid != 0, err
	})
	return pid, err
}

// with attests the process of a pod in each way, while f runs, and removes the pod.
func (r *rig) with(ctx context.Context, p kubernetes.Pod,
	f func(way string, pid uint32, a *spiffe.Attested) error) error {
	pid, err := r.start(ctx, p)
	if err != nil {
		return err
	}
	for _, way := range []string{offline, review} {
		a, attested := r.attest(ctx, way, pid)
		if attested == nil {
			attested = f(way, pid, a)
			a.Release()
		}
		if attested != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", way, attested))
		}
	}
	return errors.Join(err, r.node.API.Remove(ctx, p.Name))
}

func (r *rig) attest(ctx context.Context, way string, pid uint32) (*spiffe.Attested, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second) // as the node's attestation.timeout
	defer cancel()
	peer, err := peerOf(pid)
	if err != nil {
		return nil, err
	}
	return r.attestors[way].Attest(ctx, peer)
}

func nobody(_ string, _ uint32, a *spiffe.Attested) error {
	if id := a.Identity(); len(id.Evidence) > 0 {
		return fmt.Errorf("it is taken for %s", id.Evidence[0].Subject)
	}
	return nil
}

const sleep = "exec sleep 1000"

func (r *rig) isEvidence(ctx context.Context) (string, error) {
	pid, err := r.start(ctx, kubernetes.Pod{Name: holder, Audience: audience, ServiceAccount: account, Command: sleep})
	if err != nil {
		return "", err
	}
	var measured []string
	for _, way := range []string{offline, review} {
		began := time.Now()
		a, err := r.attest(ctx, way, pid)
		if err != nil {
			return "", err
		}
		measured = append(measured, fmt.Sprintf("%s %v", way, time.Since(began).Round(time.Millisecond)))
		id := a.Identity()
		a.Release()
		if len(id.Evidence) != 1 {
			return "", fmt.Errorf("%s: no evidence; failed checks: %v", way, r.tokens.Counts())
		}
		e := id.Evidence[0]
		k, _ := e.Claims["kubernetes.io"].(map[string]any)
		pod, _ := k["pod"].(map[string]any)
		if e.Subject != subject || e.Issuer != kubernetes.URL || pod["name"] != holder || pod["uid"] != id.Process.PodUID ||
			time.Until(e.Expires) <= 0 {
			return "", fmt.Errorf("%s: %+v", way, e)
		}
	}
	return strings.Join(measured, ", "), nil
}

func (r *rig) otherAudience(ctx context.Context) (string, error) {
	p := kubernetes.Pod{Name: "token-of-others", Audience: "vault", ServiceAccount: account, Command: sleep}
	return "", r.with(ctx, p, nobody)
}

func (r *rig) copied(ctx context.Context) (string, error) {
	file, err := r.hostFile(ctx)
	if err != nil {
		return "", err
	}
	token, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	before := r.tokens.Counts()[spiffe.CheckPod]
	p := kubernetes.Pod{Name: "token-thief", ServiceAccount: account,
		Command: "mkdir -p /var/run/secrets/klamm && echo " + string(token) + " >" + kubernetes.TokenFile + "; " + sleep}
	err = r.with(ctx, p, func(way string, pid uint32, a *spiffe.Attested) error {
		got, err := os.ReadFile(fmt.Sprintf("/proc/%d/root%s", pid, kubernetes.TokenFile))
		if err == nil && strings.TrimSpace(string(got)) != string(token) {
			err = errors.New("the pod does not have the token")
		}
		return errors.Join(err, nobody(way, pid, a))
	})
	if err == nil && r.tokens.Counts()[spiffe.CheckPod] == before {
		err = fmt.Errorf("it was refused for another reason: %v", r.tokens.Counts())
	}
	return "", err
}

// hostFile is where kubelet keeps the token of the pod that has one, on the host.
func (r *rig) hostFile(ctx context.Context) (string, error) {
	s, err := r.node.API.State(ctx, holder)
	if err != nil {
		return "", err
	}
	return "/var/lib/kubelet/pods/" + s.Metadata.UID + "/volumes/kubernetes.io~projected/klamm/token", nil
}

// trick is a command that puts something where the token is to be. HOST stands for the path of another pod's token on
// the host.
type trick struct {
	name, command string
	leaks         bool // who reads by the path alone is led to HOST
}

var tricks = []trick{
	{"an absolute link", "ln -s HOST token", true},
	{"a link with many ..", "ln -s ../../../../../../../..HOST token", false}, // nothing is above a container's root
	{"a linked directory", "cd ..; rmdir klamm; ln -s $(dirname HOST) klamm", true},
	{"the root of another process", "ln -s /proc/1/root/etc/passwd token", false},
	{"a pipe", "mkfifo token", false},
	{"a directory", "mkdir token", false},
	{"a huge file", "head -c 100000 /dev/zero >token", false},
}

func (t trick) reads(r *rig) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		host, err := r.hostFile(ctx)
		if err != nil {
			return "", err
		}
		command := "mkdir -p /var/run/secrets/klamm && cd /var/run/secrets/klamm && " +
			strings.ReplaceAll(t.command, "HOST", host) + "; " + sleep
		p := kubernetes.Pod{Name: "token-trick", ServiceAccount: account, Command: command}
		return "", r.with(ctx, p, func(way string, pid uint32, a *spiffe.Attested) error {
			if t.leaks {
				if _, err := os.ReadFile(fmt.Sprintf("/proc/%d/root%s", pid, kubernetes.TokenFile)); err != nil {
					return fmt.Errorf("the trick does not work on anybody: %w", err)
				}
			}
			return nobody(way, pid, a)
		})
	}
}

// until waits until evidence is there, or is not, and tells how long that took.
func until(ctx context.Context, a *spiffe.Attested, there bool, limit time.Duration) (time.Duration, error) {
	changed := make(chan struct{}, 1)
	unwatch := a.Watch(func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	})
	defer unwatch()
	began, late := time.Now(), time.After(limit)
	for len(a.Identity().Evidence) > 0 != there {
		select {
		case <-changed:
		case <-late:
			return limit, fmt.Errorf("evidence: %t, after %v", !there, limit)
		case <-ctx.Done():
			return time.Since(began), ctx.Err()
		}
	}
	return time.Since(began), nil
}

func (r *rig) holder(ctx context.Context) (uint32, error) {
	s, err := r.node.API.State(ctx, holder)
	if err != nil {
		return 0, err
	}
	return processOf(s.ContainerID(), "sleep")
}

func (r *rig) apiServerHangs(ctx context.Context) (string, error) {
	pid, err := r.holder(ctx)
	if err != nil {
		return "", err
	}
	a, err := r.attest(ctx, review, pid)
	if err != nil {
		return "", err
	}
	defer a.Release()
	server := r.node.PID("apiserver")
	if err := syscall.Kill(server, syscall.SIGSTOP); err != nil {
		return "", err
	}
	lost, err := until(ctx, a, false, 2*stale)
	err = errors.Join(err, syscall.Kill(server, syscall.SIGCONT))
	if err == nil && (lost < stale-every || lost > stale+time.Second) {
		err = fmt.Errorf("its evidence ended after %v", lost)
	}
	if err != nil {
		return "", err
	}
	back, err := until(ctx, a, true, 30*time.Second)
	return fmt.Sprintf("%v, with max-stale %v; back %v after the API server", lost.Round(100*time.Millisecond), stale,
		back.Round(100*time.Millisecond)), err
}

// deleted takes the pod away from the API server while the kubelet cannot end its process.
func (r *rig) deleted(ctx context.Context) (string, error) {
	pid, err := r.holder(ctx)
	if err != nil {
		return "", err
	}
	kept, err := r.attest(ctx, offline, pid)
	if err != nil {
		return "", err
	}
	defer kept.Release()
	a, err := r.attest(ctx, review, pid)
	if err != nil {
		return "", err
	}
	defer a.Release()
	kubelet := r.node.PID("kubelet")
	if err := syscall.Kill(kubelet, syscall.SIGSTOP); err != nil {
		return "", err
	}
	measured, err := r.deletedBehindKubelet(ctx, a, kept)
	if err = errors.Join(err, syscall.Kill(kubelet, syscall.SIGCONT)); err != nil {
		return measured, err
	}
	return measured, kubernetes.Await(ctx, "the end of the pod's process", func() (bool, error) {
		_, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
		return errors.Is(err, os.ErrNotExist), nil
	})
}

func (r *rig) deletedBehindKubelet(ctx context.Context, a, kept *spiffe.Attested) (string, error) {
	path := "/api/v1/namespaces/" + kubernetes.Namespace + "/pods/" + holder + "?gracePeriodSeconds=0"
	if _, err := r.node.API.Call(ctx, http.MethodDelete, path, ""); err != nil {
		return "", err
	}
	if len(a.Identity().Evidence) != 1 || len(kept.Identity().Evidence) != 1 {
		return "", errors.New("there was no evidence before")
	}
	lost, err := until(ctx, a, false, revoked)
	if err != nil {
		return "", err
	}
	left := kept.Identity()
	if len(left.Evidence) != 1 {
		return "", fmt.Errorf("%s it has ended too: the pod's deletion is not what is measured", offline)
	}
	return fmt.Sprintf("%s after %v; %s only at its exp, %v later", review, lost.Round(100*time.Millisecond), offline,
		time.Until(left.Evidence[0].Expires).Round(time.Second)), nil
}

// processOf is a process of a container that executes a program of that name; 0 when there is none.
func processOf(container, comm string) (uint32, error) {
	if container == "" {
		return 0, errors.New("the pod has no container")
	}
	all, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		return 0, err
	}
	for _, file := range all {
		text, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(text), container) {
			continue // it has ended
		}
		name, err := os.ReadFile(filepath.Join(filepath.Dir(file), "comm"))
		if err != nil || strings.TrimSpace(string(name)) != comm {
			continue
		}
		pid, err := strconv.ParseUint(filepath.Base(filepath.Dir(file)), 10, 32)
		return uint32(pid), err
	}
	return 0, nil
}

// procfs tells facts of processes from /proc, in place of the eBPF program.
type procfs struct{}

// Task implements spiffe.Tasks. The executable's inode stands in for the exec id.
func (procfs) Task(pid uint32) (spiffe.TaskFacts, error) {
	var exe, proc syscall.Stat_t
	dir := fmt.Sprintf("/proc/%d", pid)
	text, err := os.ReadFile(dir + "/stat")
	if err := errors.Join(err, syscall.Stat(dir+"/exe", &exe), syscall.Stat(dir, &proc)); err != nil {
		return spiffe.TaskFacts{}, syscall.ESRCH
	}
	fields := strings.Fields(string(text[slices.Index(text, ')')+2:]))
	ticks, err := strconv.ParseUint(fields[19], 10, 64) // starttime, proc_pid_stat(5)
	return spiffe.TaskFacts{StartBoottime: ticks * 1e7, ExecID: exe.Ino, ExeInode: exe.Ino, ExeDev: uint32(exe.Dev),
		UID: proc.Uid, GID: proc.Gid, CgroupID: 1}, err
}

func peerOf(pid uint32) (spiffe.Peer, error) {
	f, err := procfs{}.Task(pid)
	return spiffe.Peer{TGID: pid, UID: f.UID, GID: f.GID, StartBoottime: f.StartBoottime, ExecID: f.ExecID,
		ExeInode: f.ExeInode, ExeDev: f.ExeDev, CgroupID: f.CgroupID, Comm: "sleep"}, err
}
