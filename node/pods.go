package node

import (
	"fmt"
	"maps"

	"klamm/spiffe"
)

// maxPods and maxContainers bound what is known of them: a kubelet runs 110 pods by default.
const maxPods, maxContainers = 4096, 16384

// pods are what the runtime told of. A pod that is restarted gets a new sandbox before its old one is removed.
// containerd does not tell of the end of pods that are older than itself (its issue 8426; 2.4.2 too): these are
// forgotten when the node connects the next time.
type pods struct {
	sandboxes  map[string]sandbox   // by sandbox id
	byUID      map[string]string    // the newest sandbox's id, by the pod's uid
	containers map[string]container // by container id
}

// sandbox is a pod, or one life of it.
type sandbox struct {
	uid, namespace, pod string
	netns               string // a file of its network namespace; empty where that is the host's, or unknown
	cookie              uint64 // of that namespace; 0 until it is enrolled
}

// container is a container of a sandbox.
type container struct{ sandbox, name string }

func newPods() pods {
	return pods{sandboxes: map[string]sandbox{}, byUID: map[string]string{}, containers: map[string]container{}}
}

// add remembers a pod. The error says that there are too many.
func (p *pods) add(id string, s sandbox) error {
	if len(p.sandboxes) >= maxPods {
		return fmt.Errorf("%d pods are known, the limit: the names of pod %s/%s stay unknown", maxPods, s.namespace, s.pod)
	}
	p.sandboxes[id], p.byUID[s.uid] = s, id
	return nil
}

// enrolled remembers the network namespace of a pod that is enrolled.
func (p *pods) enrolled(id string, cookie uint64) {
	if s, ok := p.sandboxes[id]; ok {
		s.cookie = cookie
		p.sandboxes[id] = s
	}
}

// addContainer remembers a container. The error says that there are too many.
func (p *pods) addContainer(id string, c container) error {
	if len(p.containers) >= maxContainers {
		return fmt.Errorf("%d containers are known, the limit: the name of %s stays unknown", maxContainers, c.name)
	}
	p.containers[id] = c
	return nil
}

// remove forgets a pod and its containers.
func (p *pods) remove(id string) sandbox {
	s := p.sandboxes[id]
	delete(p.sandboxes, id)
	if p.byUID[s.uid] == id {
		delete(p.byUID, s.uid)
	}
	maps.DeleteFunc(p.containers, func(_ string, c container) bool { return c.sandbox == id })
	return s
}

// workload is what the runtime calls a container.
func (p *pods) workload(podUID, containerID string) (spiffe.Workload, bool) {
	s, ok := p.sandboxes[p.byUID[podUID]]
	w := spiffe.Workload{Namespace: s.namespace, Pod: s.pod}
	if c := p.containers[containerID]; ok && p.sandboxes[c.sandbox].uid == podUID {
		w.Container = c.name
	}
	return w, ok
}
