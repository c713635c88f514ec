package kafka

import (
	"cmp"
	"fmt"
	"unsafe"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/authz"
	"klamm/enforcer/kafka/wire"
)

// accounts are what a session holds of the node's budgets.
type accounts struct {
	requested, answered, decoding, kept, mirrors *wire.Account
}

func (s *Shared) open(owner string, evicted func(error), done <-chan struct{}) accounts {
	return accounts{
		requested: s.Requests.Open(owner, evicted, done),
		answered:  s.Answers.Open(owner, evicted, done),
		decoding:  s.Decoded.Open(owner, evicted, done),
		kept:      s.Kept.Open(owner, evicted, done),
		mirrors:   s.Kept.Open(owner, evicted, done).Lasting(),
	}
}

// close closes those that no pipe closes.
func (a *accounts) close() {
	a.decoding.Close()
	a.kept.Close()
	a.mirrors.Close()
}

// owner is whom the memory of a connection is counted to: a workload, for each broker by itself, because one that hangs
// must not take the others with it.
func (c *Conn) owner() string {
	id := c.Workload.Identity()
	p := &id.Process
	who := cmp.Or(named(id), p.ContainerID, p.Cgroup, fmt.Sprint("uid ", p.UID))
	return who + "\x00" + c.Subject.Destination
}

// evicted ends the session: it has to give way to others that wait for memory.
func (s *session) evicted(cause error) { s.end(&Error{audit.OutOfMemory, cause}) }

// maxMirror is what the mirrors of a connection's sessions take unseen by the budget: some hundred partitions.
const maxMirror = 64 << 10

// mirror takes what is beyond that, for as long as it lasts.
func (s *session) mirror(key int16) error {
	if key != int16(kmsg.Fetch) && key != int16(kmsg.ShareFetch) {
		return nil
	}
	n := s.fetchSes.Weight() + s.shareSes.Weight()
	if n <= maxMirror {
		n = 0
	}
	was := s.mirrored
	s.mirrored = n
	if n < was {
		s.memory.mirrors.Release(was - n)
	} else if n > was {
		if err := s.up.Flush(); err != nil { // or what keeps memory until it is answered never is
			return err
		}
		if err := s.memory.mirrors.Acquire(n - was); err != nil {
			return fromPipe(err, audit.OutOfMemory)
		}
	}
	return nil
}

// weigh is about what checks take, in bytes of memory.
func weigh(checks []authz.Check) int64 {
	n := int64(cap(checks)) * int64(unsafe.Sizeof(authz.Check{}))
	for i := range checks {
		n += int64(len(checks[i].Name))
	}
	return n
}
