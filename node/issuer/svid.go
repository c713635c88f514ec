package issuer

import (
	"context"
	"crypto/tls"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// SVID is an X509-SVID of the node whose registration entry has the brokers' names (spire-server entry create -dns).
type SVID struct {
	// Fetch is the SVID of now. It does not wait for the agent.
	Fetch func() (*x509svid.SVID, error)
}

// Leaf is the SVID, where it is for names.
func (s SVID) Leaf(_ context.Context, names []string) (*tls.Certificate, error) {
	svid, err := s.Fetch()
	if err != nil {
		return nil, failed("the SPIRE agent", names, err)
	}
	c := &tls.Certificate{PrivateKey: svid.PrivateKey}
	for _, der := range svid.Certificates {
		c.Certificate = append(c.Certificate, der.Raw)
	}
	if err := check(c, names, time.Now()); err != nil {
		return nil, failed(svid.ID.String()+" (give its registration entry the brokers' names by -dns)", names, err)
	}
	return c, nil
}
