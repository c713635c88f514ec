package spiffe

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
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
	f := following{tokenReader: r, first: true}
	for ctx.Err() == nil {
		if left := f.left(); left > 0 || f.doubt == nil {
			if err := f.lookAgain(ctx, tell); err != nil {
				return err
			}
		} else {
			f.take("", nil, f.doubt, tell)
		}
		f.wait(ctx)
	}
	return nil
}

// following is what was told of a token so far.
type following struct {
	tokenReader
	first  bool // nothing was told yet
	said   *Evidence
	token  string // of said
	why    error
	proven time.Time // when said was last found true
	doubt  error     // of the last look, where that ended with an unknownError and said stays nevertheless
}

// left is for how long what was said may stay when it cannot be looked at again.
func (f *following) left() time.Duration {
	if f.said == nil {
		return 0
	}
	return f.keep - time.Since(f.proven)
}

func (f *following) take(token string, e *Evidence, why error, tell func(*Evidence, error)) {
	changed := f.first || (e == nil) != (f.said == nil) || token != f.token || !sameError(why, f.why)
	f.first, f.token, f.said, f.why, f.doubt = false, token, e, why, nil
	if changed {
		tell(e, why)
	}
}

func (f *following) lookAgain(ctx context.Context, tell func(*Evidence, error)) error {
	timeout := attemptTimeout
	if left := f.left(); left > 0 {
		timeout = min(timeout, left)
	}
	looked := time.Now()
	token, e, err := f.look(ctx, f.token, timeout)
	switch unknown := new(unknownError); {
	case ctx.Err() != nil:
	case errors.Is(err, ErrGone), errors.Is(err, ErrChanged):
		return err
	case errors.As(err, unknown) && f.left() > 0:
		f.doubt = err
	case errors.Is(err, fs.ErrNotExist): // most workloads have none
		f.take("", nil, nil, tell)
	default:
		f.proven = looked
		f.take(token, e, err, tell)
	}
	return nil //nolint:nilerr // it was told
}

// look reads and verifies the token. last is the one before.
func (r tokenReader) look(ctx context.Context, last string, timeout time.Duration) (
	token string, e *Evidence, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, unknownError{errors.New("it took too long")})
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

// wait is until the next look: at the pace, and once more before the evidence ends; and no longer than it may stay.
func (f *following) wait(ctx context.Context) {
	wait := jittered(f.pace)
	if f.said != nil && !f.said.Expires.IsZero() {
		wait = min(wait, max(time.Until(f.said.Expires)-time.Second, time.Second))
	}
	if f.doubt != nil {
		wait = min(wait, f.left())
	}
	select {
	case <-ctx.Done():
	case <-time.After(wait):
	}
}

func sameError(a, b error) bool {
	return fmt.Sprint(a) == fmt.Sprint(b)
}
