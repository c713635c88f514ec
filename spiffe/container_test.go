package spiffe

import (
	"bufio"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/moby/sys/mountinfo"

	"klamm/test/bounds"
)

const (
	podUID    = "2f1d6a0e-93c4-4b0e-8f55-0123456789ab"
	staticUID = "8c0d2f4a6b8c0d2f4a6b8c0d2f4a6b8c"
)

var (
	id1 = strings.Repeat("0123456789abcdef", 4)
	id2 = strings.Repeat("fedcba9876543210", 4)
)

// abbreviated paths: UID and UID_ stand for podUID, STATIC for staticUID, ID1 and ID2 for id1 and id2.
var written = strings.NewReplacer("UID_", strings.ReplaceAll(podUID, "-", "_"), "UID", podUID, "STATIC", staticUID,
	"ID1", id1, "ID2", id2)

func TestAContainerIsFoundByItsCgroup(t *testing.T) {
	for cgroup, want := range map[string]container{
		// kubelet, cgroupfs
		"/kubepods/burstable/podUID/ID1":                 {id: id1, podUID: podUID},
		"/kubepods/besteffort/podUID/ID1":                {id: id1, podUID: podUID},
		"/kubepods/podUID/ID1":                           {id: id1, podUID: podUID},
		"/kubepods/burstable/podUID/crio-ID1":            {id: id1, podUID: podUID},
		"/kubepods/burstable/podSTATIC/ID1":              {id: id1, podUID: staticUID},
		"/klamm-k8s-x/kubepods/burstable/podUID/ID1":     {id: id1, podUID: podUID},
		"/a/b/kubepods/burstable/podUID/ID1":             {id: id1, podUID: podUID},
		"/kubepods/burstable/podUID":                     {},
		"/kubepods/burstable/podUID/crio-conmon-ID1":     {},
		"/kubepods/burstable/podother/ID1":               {},
		"/kubepods/burstable/podUID_/ID1":                {},
		"/kubepods/burstable/podUID/ID1a":                {},
		"/kubepods/burstable/podUID/web":                 {},
		"/mykubepods/burstable/podUID/ID1":               {},
		"/kubepods/other/podUID/ID1":                     {},
		"/lxc.payload.web/kubepods/burstable/podUID/ID1": {},

		// kubelet, systemd
		"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID_.slice/cri-containerd-ID1.scope": {
			id: id1, podUID: podUID},
		"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podUID_.slice/crio-ID1.scope": {
			id: id1, podUID: podUID},
		"/kubepods.slice/kubepods-podUID_.slice/docker-ID1.scope":        {id: id1, podUID: podUID},
		"/kubepods.slice/kubepods-podSTATIC.slice/crio-ID1.scope/inside": {id: id1, podUID: staticUID},
		"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-podUID_.slice/cri-containerd-ID1.scope": {
			id: id1, podUID: podUID},
		"/kubepods.slice/kubepods-podUID_.slice/crio-conmon-ID1.scope": {},
		"/kubepods.slice/kubepods-podUID_.slice/other-ID1.scope":       {},

		// without Kubernetes
		"/docker/ID1":                                                {id: id1},
		"/system.slice/docker-ID1.scope":                             {id: id1},
		"/team.slice/team-a.slice/docker-ID1.scope":                  {id: id1},
		"/machine.slice/libpod-ID1.scope":                            {id: id1},
		"/machine.slice/libpod-ID1.scope/container":                  {id: id1},
		"/machine.slice/machine-libpod_pod_x.slice/libpod-ID1.scope": {id: id1},
		"/libpod_parent/libpod-ID1":                                  {id: id1},
		"/libpod_parent/ID2/libpod-ID1":                              {id: id1},
		"/system.slice/orders.service/libpod-payload-ID1":            {id: id1},
		"/system.slice/nerdctl-ID1.scope":                            {id: id1},
		"/machine.slice/libpod-conmon-ID1.scope":                     {},
		"/default/ID1":                                               {},
		"/k8s.io/web":                                                {},
		"/ID1":                                                       {},
		"/system.slice/orders.service":                               {},
		"/":                                                          {},
		"":                                                           {},

		// names that a workload made
		"/docker/ID1/kubepods/burstable/podUID/ID2":                                           {id: id1},
		"/docker/ID1/docker/ID2":                                                              {id: id1},
		"/kubepods/podUID/ID1/kubepods/podSTATIC/ID2":                                         {id: id1, podUID: podUID},
		"/kubepods/podUID/ID1/system.slice/docker-ID2.scope":                                  {id: id1, podUID: podUID},
		"/system.slice/docker-ID1.scope/kubepods.slice/kubepods-podUID_.slice/crio-ID2.scope": {id: id1},
		"/system.slice/orders.service/kubepods/podUID/ID1":                                    {},
		"/system.slice/orders.service/system.slice/docker-ID1.scope":                          {},
		"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-ID1.scope":           {},
		"/user.slice/user-1000.slice/user@1000.service/kubepods/podUID/ID1":                   {},
		"/user.slice/user-1000.slice/user@1000.service/a/libpod-payload-ID1":                  {},
	} {
		cgroup = written.Replace(cgroup)
		got, ok := containerOf(cgroup)
		if ok != (want.id != "") || got.id != want.id || got.podUID != want.podUID {
			t.Errorf("%s: got %+v, want %+v", cgroup, got, want)
		}
		if ok && cgroup != got.path && !strings.HasPrefix(cgroup, got.path+"/") {
			t.Errorf("%s: the container's own cgroup is %q", cgroup, got.path)
		}
	}
}

func FuzzContainerOf(f *testing.F) {
	for _, cgroup := range []string{"/kubepods/burstable/podUID/ID1", "/docker/ID1", "/libpod_parent/libpod-ID1",
		"/kubepods.slice/kubepods-podUID_.slice/crio-ID1.scope", "/system.slice/a.service/libpod-payload-ID1"} {
		f.Add(written.Replace(cgroup), written.Replace("/kubepods/podSTATIC/ID2"))
	}
	f.Fuzz(func(t *testing.T, cgroup, below string) {
		var c container
		var ok bool
		bounds.Check(t, len(cgroup), 256, func() { c, ok = containerOf(cgroup) })
		if !ok {
			return
		}
		if len(c.id) != 64 || strings.ContainsAny(c.podUID, "/_.") || !strings.HasPrefix(cgroup, c.path) {
			t.Errorf("%q is of %+v", cgroup, c)
		}
		if again, ok := containerOf(c.path + "/" + below); !ok || again != c {
			t.Errorf("what lies below %q makes it %+v", c.path, again)
		}
	})
}

// ownCgroup makes a cgroup2 directory below the root for the test's own use, and tells where the root is mounted.
func ownCgroup(t *testing.T) (root, name string) {
	t.Helper()
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup2"))
	if err != nil || len(mounts) == 0 {
		t.Fatalf("cgroup2 is not mounted: %v", err)
	}
	root = mounts[0].Mountpoint
	dir, err := os.MkdirTemp(root, "klamm-test-")
	if err != nil {
		t.Fatal(err)
	}
	if err = os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		var dirs []string
		err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				dirs = append(dirs, path)
			}
			return err
		})
		for i := range dirs {
			err = errors.Join(err, os.Remove(dirs[len(dirs)-1-i]))
		}
		if err != nil {
			t.Error(err)
		}
	})
	return root, filepath.Base(dir)
}

// inCgroup runs a process in a new cgroup until the test ends.
func inCgroup(t *testing.T, root, cgroup string) *exec.Cmd {
	t.Helper()
	dir := filepath.Join(root, cgroup)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", "echo $$ > "+dir+"/cgroup.procs && echo ready && read end")
	if _, err := cmd.StdinPipe(); err != nil { // open until the process is killed
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err = cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kill(t, cmd) })
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("%q, %v", line, err)
	}
	return cmd
}

// runtime says what it was told of containers.
type runtime struct {
	mu    sync.Mutex
	known map[string]Workload
}

func (r *runtime) Workload(podUID, container string) (Workload, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	w, ok := r.known[podUID+" "+container]
	return w, ok
}

func TestWhatTheRuntimeSaysOfAContainerIsItsIdentity(t *testing.T) {
	root, name := ownCgroup(t)
	cmd := inCgroup(t, root, written.Replace(name+"/kubepods/burstable/podUID/ID1"))
	said := &runtime{known: map[string]Workload{}}
	s := byRules(t, NewProcesses(new(procTasks), root, said),
		Rule{SPIFFEID: "spiffe://example.test/other", Namespace: "other", Pod: "orders-*"},
		Rule{SPIFFEID: "spiffe://example.test/sidecar", Namespace: "shop", Container: "sidecar"},
		Rule{SPIFFEID: orders, Namespace: "shop", Pod: "orders-*", Container: "app"},
		Rule{SPIFFEID: "spiffe://example.test/shop", Namespace: "shop"})
	for _, step := range []struct {
		name string
		said Workload
		want string
	}{
		{"nothing", Workload{}, ""},
		{"the pod alone", Workload{Namespace: "shop", Pod: "orders-1"}, "spiffe://example.test/shop"},
		{"the container too", Workload{Namespace: "shop", Pod: "orders-1", Container: "app"}, orders},
		{"another pod of the namespace", Workload{Namespace: "shop", Pod: "order", Container: "app"},
			"spiffe://example.test/shop"},
	} {
		if step.said != (Workload{}) {
			said.mu.Lock()
			said.known[podUID+" "+id1] = step.said
			said.mu.Unlock()
		}
		id, err := s.Attest(t.Context(), peerOf(t, cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		p := id.Process
		if id.ID.String() != step.want || p.ContainerID != id1 || p.PodUID != podUID ||
			(Workload{p.Namespace, p.Pod, p.Container}) != step.said {
			t.Errorf("the runtime said %s: the identity is %+v", step.name, id)
		}
	}
}

func TestAContainersNameInADelegatedCgroupIsTheUsersOwn(t *testing.T) {
	root, name := ownCgroup(t)
	for _, test := range []struct {
		name, cgroup string
		owner        int
		mode         os.FileMode
		want         bool
	}{
		{"of root", "/a", 0, 0o755, true},
		{"of a user", "/b", 65534, 0o755, false},
		{"of a group that may write", "/c", 0, 0o775, false},
		{"of all", "/d", 0, 0o757, false},
	} {
		pod := written.Replace(name + test.cgroup + "/kubepods/podUID")
		cmd := inCgroup(t, root, pod+"/"+id1)
		dir := filepath.Join(root, pod)
		if err := errors.Join(os.Chown(dir, test.owner, -1), os.Chmod(dir, test.mode)); err != nil {
			t.Fatal(err)
		}
		// A container with a user namespace owns its own cgroup.
		if err := os.Chown(filepath.Join(dir, id1), 65534, -1); err != nil {
			t.Fatal(err)
		}
		s := byRules(t, NewProcesses(new(procTasks), root, nil))
		id, err := s.Attest(t.Context(), peerOf(t, cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		if got := id.Process.PodUID == podUID; got != test.want {
			t.Errorf("in a cgroup %s: %v, want %v: %+v", test.name, got, test.want, id.Process)
		}
	}
}
