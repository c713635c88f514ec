package spiffe

import (
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// moments is an identity that the test changes.
type moments struct {
	id      atomic.Pointer[Identity]
	changed func()
}

func (m *moments) Identity() *Identity { return m.id.Load() }

func (m *moments) Watch(changed func()) func() {
	m.changed = changed
	return func() { m.changed = func() {} }
}

func (m *moments) become(id Identity) {
	m.id.Store(&id)
	if m.changed != nil {
		m.changed()
	}
}

var (
	byCertificate = spiffeid.RequireFromString("spiffe://example.test/orders")
	byProcess     = spiffeid.RequireFromString("spiffe://example.test/report")
)

func TestACertificateNamesWhomNoOtherSourceKnows(t *testing.T) {
	certificate := Evidence{Source: SourceTLS, ID: byCertificate, Subject: "CN=orders", Issuer: "CN=clients"}
	for what, c := range map[string]struct {
		process Identity
		id      spiffeid.ID
		source  string
	}{
		"no source knows it": {Identity{}, byCertificate, SourceTLS},
		"another source does": {Identity{ID: byProcess, Source: SourceStatic,
			Evidence: []Evidence{{Source: SourceStatic, ID: byProcess}}}, byProcess, SourceStatic},
	} {
		var process moments
		process.become(c.process)
		j := Join(&process, certificate)
		got := j.Identity()
		if got.ID != c.id || got.Source != c.source {
			t.Errorf("%s: it is %s by %s", what, got.ID, got.Source)
		}
		if n := len(got.Evidence); n != len(c.process.Evidence)+1 || got.Evidence[n-1].Subject != "CN=orders" {
			t.Errorf("%s: the evidence is %+v", what, got.Evidence)
		}
		if j.Identity() != got {
			t.Errorf("%s: without a change the pointer is another one", what)
		}
		if allocs := testing.AllocsPerRun(100, func() { j.Identity() }); allocs > 0 {
			t.Errorf("%s: it allocates %v times", what, allocs)
		}
		j.Release()
	}
}

func TestAJoinedIdentityFollowsThatOfTheProcess(t *testing.T) {
	var process moments
	process.become(Identity{})
	j := Join(&process, Evidence{Source: SourceTLS, ID: byCertificate})
	defer j.Release()
	changes := 0
	stop := j.Watch(func() { changes++ })
	before := j.Identity()
	gone := errors.New("the process exited")
	process.become(Identity{ID: byProcess, Source: SourceStatic, Lost: gone})
	if got := j.Identity(); changes != 1 || got == before || got.ID != byProcess || !errors.Is(got.Lost, gone) ||
		len(got.Evidence) != 1 {
		t.Errorf("after %d changes it is %+v", changes, got)
	}
	stop()
	process.become(Identity{})
	if changes != 1 {
		t.Error("it was told of a change after stop")
	}
}

func TestACertificateCountsUntilItExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var process moments
		process.become(Identity{})
		j := Join(&process, Evidence{Source: SourceTLS, ID: byCertificate, Expires: time.Now().Add(time.Minute)})
		defer j.Release()
		var changes atomic.Int32
		defer j.Watch(func() { changes.Add(1) })()
		time.Sleep(59 * time.Second)
		synctest.Wait()
		if j.Identity().ID != byCertificate || changes.Load() != 0 {
			t.Error("it ended before it expired")
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if got := j.Identity(); !got.ID.IsZero() || len(got.Evidence) != 0 || changes.Load() != 1 {
			t.Errorf("after %d changes it still is %s", changes.Load(), got.ID)
		}
	})
}
