package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"
	"go.yaml.in/yaml/v3"

	"klamm/enforcer/kafka/authz"
)

// scenario is a file scenarios/<API>/<sentence>.yaml: requests that both clusters are asked, at every version and as
// every user. Messages are written as package message reads them; strings may have placeholders:
//
//	${run}       other for each play, the same on both sides
//	${side}      0 or 1, for what both sides ask of one cluster (Plain)
//	${id:TOPIC}  the topic's id
//	${NAME}      what a step before it kept
type scenario struct {
	file string
	key  int16

	Versions string    // "0-3", "2", "0, 4-6" or "13-"; absent: every version that the table and the broker speak
	Kafka    string    // ">=4.0", "<4.0": only brokers of these versions
	Plain    bool      // the reference is a broker without an authorizer: one with it fails, as the file says
	Slow     bool      // not in the lean pass
	As       []string  // absent: all users of the world
	Request  yaml.Node // of the only step
	Steps    []step
}

// step is a request.
type step struct {
	As         string               // absent: the user the scenario is played as
	API        string               // absent: the scenario's
	Version    *int16               // absent: the scenario's, of another API the highest that both speak
	Request    yaml.Node            //
	Unseen     bool                 // the answers are not compared
	Keep       map[string]string    // placeholder: path of a field in the answer, as in Groups.0.MemberID
	Until      map[string]yaml.Node // path: value; asked again until the answer has it
	Connection string               // absent: the user's own; a named one ends with the play
	Takes      time.Duration        // the answer takes as long, or longer
	Grant      rights               // instead of a request: user: topic, Topic Read that both sides give
	Revoke     rights               // and take
	Restart    bool                 // instead of a request: another node takes the place of the one there is
	Anonymous  bool                 // such a connection begins without a login

	key  int16
	made func(side int) (kmsg.Request, error) // in place of Request
}

// readScenarios reads all files below a folder whose path matches.
func readScenarios(dir string, matches func(string) bool) (all []*scenario, err error) {
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || !matches(path) {
			return err
		}
		s, err := readScenario(path)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		all = append(all, s)
		return nil
	})
	if len(all) == 0 {
		err = errors.Join(err, errors.New("there is no such scenario"))
	}
	return all, err
}

func readScenario(file string) (*scenario, error) {
	s := &scenario{file: file}
	if err := readStrictly(file, s); err != nil {
		return nil, err
	}
	var err error
	if s.key, err = keyNamed(filepath.Base(filepath.Dir(file))); err != nil {
		return nil, err
	}
	if !s.Request.IsZero() == (s.Steps != nil) {
		return nil, errors.New("a scenario has a request or steps")
	}
	if s.Steps == nil {
		s.Steps = []step{{Request: s.Request}}
	}
	return s, nameKeys(s.Steps, s.key)
}

// nameKeys finds the API of each step.
func nameKeys(steps []step, own int16) (err error) {
	for i := range steps {
		st := &steps[i]
		st.Unseen = st.Unseen || st.changes()
		if st.key = own; st.API != "" {
			if st.key, err = keyNamed(st.API); err != nil {
				return err
			}
		}
		if st.key < 0 {
			return fmt.Errorf("line %d: a step here says of which API its request is", st.Request.Line)
		}
	}
	return nil
}

// changes tells a step that has no request, but changes the world.
func (st *step) changes() bool { return st.Grant != nil || st.Revoke != nil || st.Restart }

func readStrictly(file string, into any) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	dec := yaml.NewDecoder(bytes.NewReader(text))
	dec.KnownFields(true)
	return dec.Decode(into)
}

func keyNamed(name string) (int16, error) {
	for key := range int16(kmsg.MaxKey + 1) {
		if kmsg.NameForKey(key) == name {
			return key, nil
		}
	}
	return -1, fmt.Errorf("kmsg knows no API %q", name)
}

// versionRange is what both the table and a broker speak of an API.
type versionRange struct{ min, max int16 }

func (r versionRange) has(v int16) bool { return r.min <= v && v <= r.max }

// within is what is left of it in the version table.
func (r versionRange) within(row authz.API) versionRange {
	if row.Decide == nil {
		return versionRange{0, -1}
	}
	return versionRange{max(r.min, row.Min), min(r.max, row.Max)}
}

// versions are those of a range that the scenario is about.
func (s *scenario) versions(spoken versionRange) (versions []int16, err error) {
	text := s.Versions
	if text == "" {
		text = fmt.Sprintf("%d-%d", spoken.min, spoken.max)
	}
	for part := range strings.SplitSeq(text, ",") {
		from, to, isRange := strings.Cut(strings.TrimSpace(part), "-")
		if !isRange {
			to = from
		}
		lo, errLo := strconv.ParseInt(from, 10, 16)
		hi, errHi := int64(spoken.max), error(nil)
		if to != "" {
			hi, errHi = strconv.ParseInt(to, 10, 16)
		}
		if err := errors.Join(errLo, errHi); err != nil {
			return nil, fmt.Errorf("versions: %w", err)
		}
		for v := int16(lo); v <= int16(hi); v++ {
			if spoken.has(v) {
				versions = append(versions, v)
			}
		}
	}
	return versions, nil
}

// suits tells whether the scenario is about a version of Kafka.
func (s *scenario) suits(kafka string) (bool, error) {
	if s.Kafka == "" {
		return true, nil
	}
	for _, relation := range []struct {
		sign  string
		holds func(int) bool
	}{{">=", func(c int) bool { return c >= 0 }}, {"<", func(c int) bool { return c < 0 }}} {
		if bound, is := strings.CutPrefix(s.Kafka, relation.sign); is {
			c, err := compareReleases(kafka, bound)
			return relation.holds(c), err
		}
	}
	return false, fmt.Errorf("kafka: %q is neither >=RELEASE nor <RELEASE", s.Kafka)
}

// compareReleases compares "4.4.0" with "4.0".
func compareReleases(release, bound string) (int, error) {
	parts := strings.Split(release, ".")
	for i, text := range strings.Split(bound, ".") {
		want, err := strconv.Atoi(text)
		if err != nil || i >= len(parts) {
			return 0, fmt.Errorf("%q is no release of Kafka", bound)
		}
		is, err := strconv.Atoi(parts[i])
		if err != nil {
			return 0, err
		}
		if is != want {
			return is - want, nil
		}
	}
	return 0, nil
}
