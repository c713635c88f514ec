package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// saslHandshake needs no right. What follows on the connection is read only after the answer: the client speaks of who
// it is. Version 0, after which the tokens come in frames without a header, is not spoken.
func saslHandshake(*Ctx, *kmsg.SASLHandshakeRequest) Verdict { return Verdict{Barrier: true} }
