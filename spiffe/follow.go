package spiffe

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const (
	// attemptTimeout bounds one look at a workload's token. It is less than an attestation may take: a source that does
	// not know yet must say so, and not keep the others' evidence back.
	attemptTimeout = 3 * time.Second
	// keepUnknown is for how long evidence stays when it cannot be looked at again.
	keepUnknown = 15 * time.Second
)

// unknownError says that nothing is known of a token now, for it or against it.
type unknownError struct{ error }

func (e unknownError) Unwrap() error { return e.error }

// tokenReader reads and verifies a workload's token.
type tokenReader struct {
	// read is the token; fs.ErrNotExist when the workload has none.
	read func(context.Context) (string, error)
	// verify is what the token says. An unknownError is neither for nor against it.
	verify func(ctx context.Context, token string) (*Evidence, error)
	pace   time.Duration // from one look to the next
	keep   time.Duration // for how long evidence stays when a look ends with an unknownError
}

// follow looks at a token again and again until ctx ends, and tells what it says at once and whenever that changes.
//
// When the process that connected exits, others may still hold its connection; the last token then speaks for them
// until it ends or is revoked.
func (r tokenReader) follow(ctx context.Context, tell func(*Evidence, error)) error {
	var said *Evidence // of token
	var token string
	var why error
	var proven time.Time // when said was last found true
	for first := true; ctx.Err() == nil; first = false {
		looked := time.Now()
		now, e, err := r.look(ctx, token)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // look's error is that of ctx
		}
		switch unknown := new(unknownError); {
		case errors.Is(err, ErrGone), errors.Is(err, ErrChanged):
			return err
		case errors.As(err, unknown) && said != nil && looked.Sub(proven) < r.keep:
			now, e, err = token, said, nil
		case err == nil:
			proven = looked
		}
		if first || (e == nil) != (said == nil) || now != token || !sameError(err, why) {
			tell(e, err)
		}
		token, said, why = now, e, err
		r.wait(ctx, said)
	}
	return nil
}

// look reads and verifies the token. last is the one before.
func (r tokenReader) look(ctx context.Context, last string) (token string, e *Evidence, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, attemptTimeout, unknownError{errors.New("it took too long")})
	defer cancel()
	token, err = r.read(ctx)
	if errors.Is(err, ErrGone) && last != "" {
		token, err = last, nil
	}
	if err != nil {
		return "", nil, err
	}
	if e, err = r.verify(ctx, token); err != nil {
		return "", nil, err
	}
	return token, e, nil
}

// wait is until the next look: at the pace, and once more before the evidence ends.
func (r tokenReader) wait(ctx context.Context, said *Evidence) {
	wait := jittered(r.pace)
	if said != nil && !said.Expires.IsZero() {
		wait = min(wait, max(time.Until(said.Expires)-time.Second, time.Second))
	}
	select {
	case <-ctx.Done():
	case <-time.After(wait):
	}
}

func sameError(a, b error) bool {
	return fmt.Sprint(a) == fmt.Sprint(b)
}
