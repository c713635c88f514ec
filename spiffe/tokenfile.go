package spiffe

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"
)

// tokenPace is how often a workload's token is read anew.
const tokenPace = 10 * time.Second

// TokenFileOptions are one place where a workload may have a token.
type TokenFileOptions struct {
	Path     string // absolute, as the workload sees it
	Issuer   string // by its name in Tokens: an issuer, or spiffe://TRUST-DOMAIN for JWT-SVIDs
	Audience string // what the token is for
}

// TokenFile is the source that takes a token which a process has in a file for evidence of who it is: whoever may read
// such a file is whom it names.
type TokenFile struct {
	files     []TokenFileOptions
	tokens    *Tokens
	processes *Processes
	pace      time.Duration
}

// NewTokenFile looks at the files in their order: the first that a process has is the one that counts.
func NewTokenFile(tokens *Tokens, processes *Processes, files ...TokenFileOptions) (*TokenFile, error) {
	for _, f := range files {
		if tokens.find(f.Issuer) == nil {
			return nil, fmt.Errorf("token file %s: unknown issuer %q", f.Path, f.Issuer)
		}
	}
	return &TokenFile{files, tokens, processes, tokenPace}, nil
}

// Name is SourceTokenFile.
func (s *TokenFile) Name() string { return SourceTokenFile }

func (s *TokenFile) watch(ctx context.Context, p subject, tell func(*Evidence, error)) error {
	var of TokenFileOptions
	reader := tokenReader{pace: s.pace, keep: keepUnknown}
	reader.read = func(ctx context.Context) (token string, err error) {
		for _, of = range s.files {
			if token, err = s.processes.readToken(ctx, p, of.Path); !errors.Is(err, fs.ErrNotExist) {
				break
			}
		}
		return token, err
	}
	reader.verify = func(ctx context.Context, token string) (*Evidence, error) {
		e, err := s.tokens.verify(ctx, token, of.Issuer, []string{of.Audience})
		if err != nil {
			return nil, fmt.Errorf("%s of process %d: %w", of.Path, p.peer.TGID, err)
		}
		e.Source = SourceTokenFile
		return e, nil
	}
	return reader.follow(ctx, tell)
}

// readToken is the token in a file, without the line end that may follow it.
func (ps *Processes) readToken(ctx context.Context, p subject, file string) (string, error) {
	text, err := ps.readFile(ctx, p, file)
	return strings.TrimSpace(string(text)), err
}
