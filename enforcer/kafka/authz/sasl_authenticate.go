package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// saslAuthenticate needs no right. A principal counts only after the broker's success, so nothing behind it is read
// before the answer.
func saslAuthenticate(*Ctx, *kmsg.SASLAuthenticateRequest) Verdict { return Verdict{Barrier: true} }
