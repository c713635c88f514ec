package spiffe

import (
	"path"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

// Workloads tells what the container runtime of this host says of its containers. It may learn of one after the
// container's first process was seen, and is asked anew for each connection.
type Workloads interface {
	// Workload is about a container by its pod's uid and its own id. False: the runtime does not know the pod.
	Workload(podUID, container string) (Workload, bool)
}

// Workload is what a container runtime calls a container.
type Workload struct {
	Namespace, Pod string
	Container      string // empty where the runtime knows the pod but not that container of it
}

// container is a container by its cgroup. Names of cgroups below path are the workload's own and say nothing.
type container struct {
	path   string // cgroup2 path
	id     string // 64 hex digits, of its runtime
	podUID string // as kubelet has it: a UUID, or 32 hex digits for a static pod; empty outside of pods
}

const (
	containerID = `(?P<id>[0-9a-f]{64})`
	// A name with a dot may be a systemd unit's, below which the unit may have any names made.
	cgroupRoot = `(?:/[^/.]+)*?`
	unitSlices = `(?:/[^/]+\.slice)`
)

// layouts are where the runtimes put containers. containerd's own clients (ctr) are missing: /NAMESPACE/NAME can be
// anything else as well. So is what a unit of a user makes (rootless podman): the user chooses the names.
var layouts = []*regexp.Regexp{
	// kubelet with cgroupDriver cgroupfs; cgroupRoot may be in front.
	layout(cgroupRoot + `/kubepods(?:/burstable|/besteffort)?` +
		`/pod(?P<uid>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32})/(?:crio-)?` + containerID),
	// kubelet with cgroupDriver systemd, where a dash in a slice's name separates it from its parent's.
	layout(unitSlices + `*?/(?:[^/]+-)?kubepods(?:-burstable|-besteffort)?` +
		`-pod(?P<uid>[0-9a-f]{8}(?:_[0-9a-f]{4}){3}_[0-9a-f]{12}|[0-9a-f]{32})\.slice` +
		`/(?:cri-containerd|crio|docker)-` + containerID + `\.scope`),
	// Docker, podman and nerdctl with systemd.
	layout(unitSlices + `+?/(?:docker|libpod|nerdctl)-` + containerID + `\.scope`),
	// podman in a unit of its own (Quadlet, --cgroups=split).
	layout(unitSlices + `+?/[^/]+\.service/libpod-payload-` + containerID),
	// Docker and podman with cgroupfs.
	layout(`/docker/` + containerID),
	layout(`/libpod_parent/(?:[0-9a-f]{64}/)?libpod-` + containerID),
}

func layout(path string) *regexp.Regexp { return regexp.MustCompile(`^(?P<path>` + path + `)(?:/|$)`) }

// containerOf finds the outermost container that a cgroup2 path leads through.
func containerOf(cgroup string) (c container, ok bool) {
	for _, l := range layouts {
		m := l.FindStringSubmatch(cgroup)
		if m == nil {
			continue
		}
		found := container{path: m[l.SubexpIndex("path")], id: m[l.SubexpIndex("id")]}
		if i := l.SubexpIndex("uid"); i > 0 {
			found.podUID = strings.ReplaceAll(m[i], "_", "-")
		}
		if !ok || len(found.path) < len(c.path) {
			c, ok = found, true
		}
	}
	return c, ok
}

// madeByRoot tells whether only root can have made the container's cgroup, and so named it: mkdir(2) in cgroupfs needs
// write permission on the parent directory, which is the user's where a cgroup was delegated to one. The cgroup itself
// may belong to somebody else: a container with a user namespace is given its own. root is where cgroup2 is mounted.
func (c container) madeByRoot(root string) bool {
	var parent unix.Stat_t
	if unix.Stat(filepath.Join(root, path.Dir(c.path)), &parent) != nil {
		return false
	}
	return parent.Uid == 0 && parent.Mode&0o022 == 0
}
