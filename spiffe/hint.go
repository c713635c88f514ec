package spiffe

import (
	"crypto/x509"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Hinted finds, each time it is asked, the node's own X509-SVID that SPIRE gives a hint to: the first of those with it,
// or of all where the hint is empty.
func (a *Agent) Hinted(hint string) func() (*x509svid.SVID, error) {
	if hint == "" {
		return a.GetX509SVID
	}
	return func() (*x509svid.SVID, error) {
		a.mu.Lock()
		defer a.mu.Unlock()
		i := slices.IndexFunc(a.svids, func(s *x509svid.SVID) bool { return s.Hint == hint })
		if i < 0 {
			return nil, fmt.Errorf("the node has no X509-SVID with the hint %q: %w", hint, a.why())
		}
		svid := a.svids[i]
		if end := svid.Certificates[0].NotAfter; !time.Now().Before(end) {
			return nil, fmt.Errorf("the node's X509-SVID %s expired at %s: %w", svid.ID, end.Format(time.RFC3339), a.why())
		}
		return svid, nil
	}
}

// Authorities are those of all bundles by which SVIDs are verified now.
func (a *Agent) Authorities() (all []*x509.Certificate) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.bundles == nil || !a.silent.IsZero() && time.Since(a.silent) > maxSilence {
		return nil
	}
	for _, b := range a.bundles.Bundles() {
		all = append(all, b.X509Authorities()...)
	}
	return all
}
