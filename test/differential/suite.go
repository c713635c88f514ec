package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/kafka/authz"
	"klamm/test/message"
)

// suite counts plays.
type suite struct {
	mutate         bool
	klamm          string
	began          time.Time
	passed, failed int
	plays          int
}

// play plays scenarios on one release of Kafka.
func (s *suite) play(ctx context.Context, version string, scenarios []*scenario) (err error) {
	w, err := newWorld(ctx, version, s.klamm, s.mutate)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	s.progress("Kafka %s is up", version)
	for i, sc := range scenarios {
		if i == 0 || scenarios[i-1].key != sc.key {
			s.progress("Kafka %s: %s", version, kmsg.NameForKey(sc.key))
		}
		if err := s.playAll(ctx, w, sc); err != nil {
			return err
		}
	}
	s.progress("Kafka %s: %d passed, %d failed", version, s.passed, s.failed)
	return nil
}

func (s *suite) progress(format string, args ...any) {
	fmt.Printf("%6s  %s\n", time.Since(s.began).Round(time.Second), fmt.Sprintf(format, args...))
}

// playAll plays a scenario at every version as every user.
func (s *suite) playAll(ctx context.Context, w *world, sc *scenario) error {
	if suits, err := sc.suits(w.version); err != nil || !suits {
		return err
	}
	if authz.Table[sc.key].Decide == nil {
		s.fail(sc, "", errors.New("the version table has no row for this API"))
		return nil
	}
	spoken, known := w.spoken[sc.key]
	if !known {
		return nil
	}
	versions, err := sc.versions(spoken.within(authz.Table[sc.key]))
	if err != nil {
		return fmt.Errorf("%s: %w", sc.file, err)
	}
	users := sc.As
	if users == nil {
		users = w.names
	}
	for _, version := range versions {
		for _, user := range users {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			s.plays++
			p := w.newPlay(sc, version, user, fmt.Sprintf("r%d", s.plays))
			s.playOnce(p, sc)
		}
	}
	return nil
}

func (s *suite) playOnce(p *play, sc *scenario) {
	defer p.end()
	for i := range sc.Steps {
		f, err := p.step(&sc.Steps[i])
		where := fmt.Sprintf("Kafka %s, version %d, %s, step %d", p.world.version, p.version, p.user, i+1)
		if err != nil {
			s.fail(sc, where, err)
			return
		}
		if len(f.differs) > 0 {
			s.fail(sc, where, f)
			return
		}
	}
	s.passed++
}

func (s *suite) fail(sc *scenario, where string, why error) {
	s.failed++
	sentence := strings.TrimSuffix(filepath.Base(sc.file), ".yaml")
	fmt.Printf("FAIL  %s/%s (%s)\n%s\n", kmsg.NameForKey(sc.key), sentence, where, indent(why.Error()))
}

func indent(text string) string {
	return "      " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n      ")
}

// Error shows what was asked and what differs.
func (f *finding) Error() string {
	var s strings.Builder
	for _, d := range f.differs {
		fmt.Fprintln(&s, d)
	}
	fmt.Fprintf(&s, "asked:\n%s", indent(message.Show(f.request)))
	return s.String()
}
