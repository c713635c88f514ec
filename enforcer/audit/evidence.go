package audit

import (
	"time"

	"github.com/rs/zerolog"

	"klamm/spiffe"
)

// evidence is all there is of who the subject is: of its identity, and the token it logged in with.
type evidence []spiffe.Evidence

// evidence leaves out what a lone attestation rule says: the fields of the identity tell it.
func (s *Subject) evidence() evidence {
	all := s.Identity.Evidence
	if s.Login.Token != nil {
		return append(all[:len(all):len(all)], *s.Login.Token)
	}
	if len(all) == 1 && all[0].Source == spiffe.SourceStatic {
		return nil
	}
	return all
}

// MarshalZerologArray writes the evidence into a line. What a token claims beyond its principal stays out.
func (all evidence) MarshalZerologArray(a *zerolog.Array) {
	for i := range all {
		e := &all[i]
		d := zerolog.Dict().Str("source", e.Source)
		for _, f := range []struct{ key, value string }{
			{"id", e.ID.String()},
			{"rule", e.Rule},
			{"issuer", e.Issuer},
			{"subject", e.Subject},
			{"hint", e.Hint},
		} {
			if f.value != "" {
				d = d.Str(f.key, f.value)
			}
		}
		if !e.Expires.IsZero() {
			d = d.Str("expires", e.Expires.UTC().Format(time.RFC3339))
		}
		a.Dict(d)
	}
}
