package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"klamm/test/kafka"
)

// application is one of Apache Kafka's own programs, or some that work together. It is run once with exactly the rights
// listed, which must do, and once more without each of them, which it must tell of in Kafka's terms: so the list is
// what it takes, no more and no less. docs/policy.md has the lists for users.
//
// In rights and what is said, {id} is the actor's id.
type application struct {
	name   string // of its row, and the id of the actor with all rights
	uid    uint32 // of that actor; those of the others follow
	obtain func(context.Context, *rig) error
	topics []string // made for it, of three partitions each
	rights []right

	feed  func(context.Context, *rig, *application) error      // makes what there is before it begins; nil: nothing
	calls func(*rig, *actor) ([]call, error)                   // the programs, which run at the same time
	check func(context.Context, *rig, *actor, []outcome) error // whether what they were to do is done, and no more
	// steady is a run with all rights while brokers go down. It takes the place of calls and check.
	steady func(context.Context, *rig, *application) error
	// turn is held by applications that use the same topics, which their program has built in; nil: it uses its own.
	turn *sync.Mutex
}

// right is one entry of an application's rule.
type right struct {
	allow string // as in a policy
	says  string // what the application says without it, a regular expression; empty: another application shows it
	keeps string // topic that has no new record without it; may be empty
	hides string // what the application must not say without it; may be empty
}

const (
	delivers = "delivers"
	rightsOf = "without each right"
)

var applicationColumns = []string{delivers, rightsOf}

// actor is who an application runs as: a user with rights of its own.
type actor struct {
	id     string // names its SPIFFE ID, groups and transactional ids
	uid    uint32
	rights []right
}

// In this order they are begun: the two that have the same topics are far apart.
var applications = []application{
	{
		name:   "word-count",
		uid:    20100,
		obtain: staged("kafka-streams", "streams", kafka.StreamsDir),
		topics: []string{wordInput, wordOutput},
		rights: wordCountRights(`(?s)Could not create topic {id}-.*TopicAuthorizationException`),
		feed:   feedWords,
		calls:  wordCount("classic"),
		check:  wordsCounted,
		turn:   &wordTurn,
	}, {
		name:   "connect-distributed",
		uid:    20200,
		obtain: staged("kafka-connect", "connect", kafka.ConnectDir),
		rights: connectWorkerRights(),
		calls:  copyFileDistributed,
		check:  fileCopied,
	}, {
		name:   "connect",
		uid:    20300,
		obtain: staged("kafka-connect", "connect", kafka.ConnectDir),
		rights: connectorRights,
		calls:  copyFile,
		check:  fileCopied,
	}, {
		name:   "verifiable-classic",
		uid:    20400,
		obtain: javaTools,
		topics: []string{"verifiable-classic"},
		rights: verifiableRights("verifiable-classic"),
		calls:  verifiable("verifiable-classic", kafka.VerifiableConsumer+" --group-protocol classic"),
		check:  consumedInOrder,
	}, {
		name:   "verifiable-consumer",
		uid:    20500,
		obtain: javaTools,
		topics: []string{"verifiable-consumer"},
		rights: verifiableRights("verifiable-consumer"),
		calls:  verifiable("verifiable-consumer", kafka.VerifiableConsumer+" --group-protocol consumer"),
		check:  consumedInOrder,
	}, {
		name:   "share",
		uid:    20600,
		obtain: javaTools,
		topics: []string{"share"},
		rights: verifiableRights("share"),
		feed:   shareFromTheBeginning,
		calls:  verifiable("share", kafka.VerifiableShare+" --acknowledgement-mode sync"),
		check:  sharedAndAcknowledged,
	}, {
		name:   "copier",
		uid:    20700,
		obtain: javaTools,
		topics: []string{copyInput, copyOutput},
		rights: []right{
			{allow: "topic: copy-in, operations: [Read]", says: topicDenied(copyInput), keeps: copyOutput},
			{allow: "topic: copy-out, operations: [Write]", says: topicDenied(copyOutput), keeps: copyOutput},
			{allow: `group: "{id}", operations: [Read]`, says: groupDenied("{id}"), keeps: copyOutput},
			{allow: `transactional-id: "{id}", operations: [Write]`, says: transactionalDenied, keeps: copyOutput},
		},
		feed:   feedCopier,
		calls:  copiers,
		steady: copiesExactlyOnce,
	}, {
		name:   "word-count-streams",
		uid:    20800,
		obtain: staged("kafka-streams", "streams", kafka.StreamsDir),
		rights: wordCountRights("Unauthorized to CREATE on topics {id}-"),
		feed:   feedWords,
		calls:  wordCount("streams"),
		check:  wordsCounted,
		turn:   &wordTurn,
	},
}

// What Kafka's Java clients say of refusals.
const transactionalDenied = `TransactionalIdAuthorizationException`

func topicDenied(name string) string { return `Not authorized to access topics: \[[^]]*` + name }
func groupDenied(name string) string { return `Not authorized to access group: ` + name }

// actors are all actors: each application's with all its rights, and one without each.
func (a *application) actors() []actor {
	all := []actor{{id: a.name, rights: a.rights}}
	for i := range a.rights {
		var others []right
		others = append(append(others, a.rights[:i]...), a.rights[i+1:]...)
		all = append(all, actor{id: fmt.Sprintf("%s-without-%d", a.name, i+1), rights: others})
	}
	for i := range all {
		all[i].uid = a.uid + uint32(i)
	}
	return all
}

func (as *actor) fill(text string) string { return strings.ReplaceAll(text, "{id}", as.id) }

// actorIdentities are the lines of klamm.yaml.
func actorIdentities() string {
	var text strings.Builder
	for i := range applications {
		for _, as := range applications[i].actors() {
			fmt.Fprintf(&text, "  - {name: %s, spiffe-id: %q, uid: %d}\n", as.id, as.spiffeID(), as.uid)
		}
	}
	return text.String()
}

func (as *actor) spiffeID() string { return "spiffe://clients.test/" + as.id }

// actorRules are the rules of the policy.
func actorRules() string {
	var text strings.Builder
	for i := range applications {
		for _, as := range applications[i].actors() {
			fmt.Fprintf(&text, "  - name: %s\n    principals: [%q]\n    allow:\n", as.id, as.spiffeID())
			for _, right := range as.rights {
				fmt.Fprintf(&text, "      - {%s}\n", as.fill(right.allow))
			}
		}
	}
	return text.String()
}

// runApplication runs an application with all its rights and without each.
func runApplication(ctx context.Context, r *rig, s *sheet) {
	a := s.application
	if a.turn != nil {
		a.turn.Lock()
		defer a.turn.Unlock()
	}
	if a.feed != nil {
		if err := a.feed(ctx, r, a); err != nil {
			s.note(delivers, err)
			s.note(rightsOf, err)
			return
		}
	}
	actors := a.actors()
	if a.steady == nil {
		s.note(delivers, a.delivers(ctx, r, &actors[0]))
	}
	var failures []error
	for i, without := range a.rights {
		if without.says == "" {
			continue
		}
		if err := a.isRefused(ctx, r, &actors[i+1], without); err != nil {
			failures = append(failures, fmt.Errorf("without {%s}: %w", actors[i+1].fill(without.allow), err))
		}
	}
	s.note(rightsOf, errors.Join(failures...))
}

// delivers: with all its rights an application does what it is for, and meets no refusal.
func (a *application) delivers(ctx context.Context, r *rig, as *actor) error {
	calls, err := a.calls(r, as)
	if err != nil {
		return err
	}
	outcomes := r.together(ctx, as, calls)
	if err := a.check(ctx, r, as, outcomes); err != nil {
		return err
	}
	return r.meetsNoRefusal(as)
}

// isRefused: without one of its rights an application says so in Kafka's terms, as it was refused by the node.
func (a *application) isRefused(ctx context.Context, r *rig, as *actor, without right) error {
	calls, err := a.calls(r, as)
	if err != nil {
		return err
	}
	var before []int64
	if without.keeps != "" {
		if before, err = r.offsets(ctx, without.keeps, latest); err != nil {
			return err
		}
	}
	says := regexp.MustCompile(as.fill(without.says))
	said := false
	for i := range calls {
		calls[i].limit, calls[i].until, calls[i].done = deniedLimit, says, nil
	}
	outcomes := r.together(ctx, as, calls)
	for _, o := range outcomes {
		said = said || says.MatchString(o.all)
		if without.hides != "" && strings.Contains(o.out, without.hides) {
			return o.failure("it said %q", without.hides)
		}
	}
	if !said {
		for _, o := range outcomes {
			err = errors.Join(err, o.failure("it did not say %q", says))
		}
		return err
	}
	if without.keeps != "" {
		if err := r.nothingCameTo(ctx, without.keeps, before); err != nil {
			return err
		}
	}
	refused, err := r.refusals(as)
	if err == nil && len(refused) == 0 {
		return errors.New("the audit tells of no refusal")
	}
	return err
}

func (r *rig) nothingCameTo(ctx context.Context, topic string, before []int64) error {
	records, err := r.records(ctx, topic)
	if err != nil {
		return err
	}
	for _, record := range records {
		if record.Offset >= before[record.Partition] {
			return fmt.Errorf("it was refused, but wrote %q to %s", record.Value, topic)
		}
	}
	return nil
}

// together runs the programs of an application at the same time. When one has said what is awaited of any, or has
// failed, the others need not go on.
func (r *rig) together(ctx context.Context, as *actor, calls []call) []outcome {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	outcomes := make([]outcome, len(calls))
	var all sync.WaitGroup
	for i, c := range calls {
		all.Go(func() {
			c.uid = as.uid
			outcomes[i] = r.run(ctx, c)
			if outcomes[i].err != nil || c.until != nil && c.until.MatchString(outcomes[i].all) {
				cancel()
			}
		})
	}
	all.Wait()
	return outcomes
}

func (r *rig) meetsNoRefusal(as *actor) error {
	refused, err := r.refusals(as)
	if err == nil && len(refused) > 0 {
		return fmt.Errorf("it was refused, first: %s", refused[0])
	}
	return err
}

// refusals returns the audit's lines of what an actor was refused, brokers apart that were down.
func (r *rig) refusals(as *actor) (refused []string, err error) {
	text, err := os.ReadFile(r.auditFile())
	if err != nil {
		return nil, err
	}
	seen := false
	for line := range bytes.Lines(text) {
		if !bytes.Contains(line, []byte(`"spiffe_id":"`+as.spiffeID()+`"`)) {
			continue
		}
		seen = true
		if bytes.Contains(line, []byte(`"verdict":"deny"`)) && !bytes.Contains(line, []byte(`"broker_unreachable"`)) {
			refused = append(refused, string(line))
		}
	}
	if !seen {
		return nil, errors.New("the audit does not know of it: its connections did not go through the node")
	}
	return refused, nil
}

// place makes a directory of an actor's own, with files.
func (r *rig) place(as *actor, files map[string]string) (string, error) {
	dir := filepath.Join(r.stage, as.id)
	if err := makeDir(dir, 0o755); err != nil {
		return "", err
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return "", err
		}
	}
	return dir, os.Chown(dir, int(as.uid), int(as.uid))
}

// makeDir makes a directory whose mode the umask does not change.
func makeDir(path string, mode os.FileMode) error {
	return errors.Join(os.MkdirAll(path, mode), os.Chmod(path, mode))
}

// await asks until there is an answer, or an error.
func await(ctx context.Context, what string, asked func() (bool, error)) error {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		if ok, err := asked(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", what, ctx.Err())
		case <-tick.C:
		}
	}
}
