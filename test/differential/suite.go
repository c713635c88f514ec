package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/kafka/authz"
	"klamm/test/kafka"
	"klamm/test/message"
)

// slow is longer than a scenario should take at all versions as all users.
const slow = 15 * time.Second

// suite plays and counts.
type suite struct {
	scenarios   []*scenario
	differences []*deliberate
	except      exceptions
	seeds       []uint64
	lean        bool // only the oldest and the newest version of each scenario
	mutate      bool
	klamm       string
	began       time.Time

	plays, passed, failed int
	coverage              coverage
	spoken                map[string]map[int16]versionRange // by release of Kafka
	played                map[*scenario]bool
	toAdmin               map[string]any // what the super user saw, by version and step of the scenario
}

func newSuite() *suite {
	return &suite{began: time.Now(), coverage: coverage{}, spoken: map[string]map[int16]versionRange{},
		played: map[*scenario]bool{}}
}

// play plays everything on one release of Kafka.
func (s *suite) play(ctx context.Context, version string) (err error) {
	w, err := newWorld(ctx, version, s.klamm, s.mutate)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	s.spoken[version] = w.spoken
	s.progress("Kafka %s is up", version)
	for i, sc := range s.scenarios {
		if i == 0 || s.scenarios[i-1].key != sc.key {
			s.progress("Kafka %s: %s", version, kmsg.NameForKey(sc.key))
		}
		began := time.Now()
		if err := s.playAll(ctx, w, sc); err != nil {
			return err
		}
		if took := time.Since(began); took > slow {
			s.progress("Kafka %s: %s took %s", version, sc.name(), took.Round(time.Second))
		}
	}
	for _, seed := range s.seeds {
		s.progress("Kafka %s: random requests of seed %d", version, seed)
		if err := s.playRandom(ctx, w, seed); err != nil {
			return err
		}
	}
	s.progress("Kafka %s: %d passed, %d failed so far", version, s.passed, s.failed)
	return nil
}

func (s *suite) progress(format string, args ...any) {
	fmt.Printf("%6s  %s\n", time.Since(s.began).Round(time.Second), fmt.Sprintf(format, args...))
}

// playAll plays a scenario at every version as every user.
func (s *suite) playAll(ctx context.Context, w *world, sc *scenario) error {
	if suits, err := sc.suits(w.version); err != nil || !suits || sc.Slow && s.lean {
		return err
	}
	if authz.Table[sc.key].Decide == nil {
		s.fail(sc.name(), errors.New("the version table has no row for this API"))
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
	if s.lean && len(versions) > 2 {
		versions = []int16{versions[0], versions[len(versions)-1]}
	}
	users := sc.As
	if users == nil {
		users = w.names
	}
	s.toAdmin = map[string]any{}
	for _, version := range versions {
		for _, user := range users {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			s.plays++
			s.played[sc] = true
			p := w.newPlay(sc, version, user, fmt.Sprintf("r%d", s.plays))
			s.playSteps(p, sc.name(), sc.Steps, true)
		}
	}
	return nil
}

// playRandom plays a seed's random requests.
func (s *suite) playRandom(ctx context.Context, w *world, seed uint64) error {
	for key := range int16(kmsg.MaxKey + 1) {
		spoken := w.spoken[key].within(authz.Table[key])
		if _, skip := never[kmsg.Key(key)]; skip || !w.speaks(key) || spoken.max < spoken.min {
			continue
		}
		for n := range perSeed {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			p, st := w.randomPlay(seed, key, n)
			s.playSteps(p, fmt.Sprintf("%s/SEED=%d request %d", kmsg.NameForKey(key), seed, n), []step{*st}, false)
		}
	}
	return nil
}

// playSteps plays steps up to the first that differs. What random requests cover by chance does not count.
func (s *suite) playSteps(p *play, name string, steps []step, counts bool) {
	defer p.end()
	defer func() {
		if err := p.world.revokeAll(); err != nil {
			s.fail(name, err)
		}
	}()
	for i := range steps {
		st := &steps[i]
		f, err := p.step(st)
		if err == nil {
			f.differs = slices.DeleteFunc(f.differs, func(d difference) bool { return covers(s.differences, name, d) })
		}
		if err == nil && len(f.differs) > 0 {
			err = f
		}
		if err != nil {
			s.fail(fmt.Sprintf("%s (Kafka %s, version %d, %s, step %d)", name, p.world.version, p.version, p.user, i+1), err)
			return
		}
		if counts && !st.Unseen {
			s.cover(p, st, i, f)
		}
	}
	s.passed++
}

// cover counts what a step has asked and what came of it.
func (s *suite) cover(p *play, st *step, i int, f *finding) {
	place := fmt.Sprint(p.version, i)
	if p.user == kafka.Admin {
		s.toAdmin[place] = f.shown[0]
	}
	classes := append(asked(f.request, p.sides[0]), came(f.shown[0], s.toAdmin[place]))
	s.coverage.add(cell{st.key, f.request.GetVersion()}, classes...)
}

func (s *suite) fail(name string, why error) {
	s.failed++
	fmt.Printf("FAIL  %s\n%s\n", name, indent(why.Error()))
}

// speaks tells whether any of the brokers speaks a version of an API.
func (s *suite) speaks(key, version int16) bool {
	for _, spoken := range s.spoken {
		if r, is := spoken[key]; is && r.has(version) {
			return true
		}
	}
	return false
}

// finish reports, and fails what was to be covered or used and is not.
func (s *suite) finish() {
	s.coverage.print(os.Stdout, s.speaks, s.except)
	for _, blank := range s.coverage.blanks(s.speaks, s.except) {
		s.fail("coverage", fmt.Errorf("nothing was asked of %s", blank))
	}
	for _, idle := range s.except.idle(s.coverage, s.speaks) {
		s.fail("coverage.yaml", fmt.Errorf("%s: there is no need for it", idle))
	}
	fmt.Println("deliberate differences:")
	for _, d := range s.differences {
		fmt.Printf("  %s: %s\n", strings.Join(d.Fields, ", "), d.Reason)
		for _, f := range d.Fields {
			if !d.used[f] {
				s.fail("differences", fmt.Errorf("%s %s does not differ: take it from the list", d.Scenario, f))
			}
		}
	}
	for _, sc := range s.scenarios {
		if !s.played[sc] {
			s.fail(sc.name(), errors.New("no broker here is asked it"))
		}
	}
}

// name is the scenario's API and sentence.
func (s *scenario) name() string {
	return kmsg.NameForKey(s.key) + "/" + strings.TrimSuffix(filepath.Base(s.file), ".yaml")
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
