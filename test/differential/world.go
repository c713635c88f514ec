package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/kafka/authz"
	"klamm/test/host"
	"klamm/test/kafka"
)

// people is world/users.yaml.
type people map[string]struct {
	Login string // absent: the name itself
	From  string // address that the user connects from
}

// brokers is an entry of world/brokers.yaml: properties of brokers of these versions.
type brokers struct {
	Kafka   string
	Config  map[string]string
	Without []string // APIs that are not asked
}

// world is what requests are asked of: three clusters of one version of Kafka and a node.
//
// Cluster A has an authorizer and ACLs and is asked directly. Cluster B has none and is asked through the node, whose
// policy says what the ACLs say. Without an authorizer brokers know no ACLs (SECURITY_DISABLED), so that the keys of
// their administration are asked of a third one, also through the node: it has an authorizer to which every user is a
// super user, which for all else is the same as none.
type world struct {
	version     string
	users       people
	names       []string // of users, the super user first
	spoken      map[int16]versionRange
	without     []string // APIs that are not asked
	direct      *side
	plain       *side // cluster B, but asked directly
	through     *side
	throughACLs *side

	dir, cgroup string
	dialer      *host.Dialer // in the cgroup that the node redirects
	node        *host.Process
	metrics     string // address of the node's
	clusters    []*kafka.Cluster
	klamm       string                           // the binary under test
	granted     []kmsg.CreateACLsRequestCreation // beside those of acls.txt
}

const worldDir = "world"

// newWorld starts all of it and plays what is in the world's folder.
func newWorld(ctx context.Context, version, klamm string, mutate bool) (_ *world, err error) {
	w := &world{version: version, spoken: map[int16]versionRange{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if err = readStrictly(filepath.Join(worldDir, "users.yaml"), &w.users); err != nil {
		return nil, err
	}
	others := maps.Clone(w.users)
	delete(others, kafka.Admin)
	w.names = append([]string{kafka.Admin}, slices.Sorted(maps.Keys(others))...)
	if w.dir, err = os.MkdirTemp("", "klamm-differential-"); err != nil {
		return nil, err
	}
	if w.cgroup, err = host.NewCgroup("klamm-differential-", "node", "clients"); err != nil {
		return nil, err
	}
	if w.dialer, err = host.StartDialer(kafka.Place{Cgroup: filepath.Join(w.cgroup, "clients")}, ""); err != nil {
		return nil, err
	}
	if err = w.startClusters(ctx); err != nil {
		return nil, err
	}
	if err = w.startNode(ctx, klamm, mutate); err != nil {
		return nil, err
	}
	return w, w.furnish()
}

func (w *world) startClusters(ctx context.Context) error {
	acls, err := readACLs(filepath.Join(worldDir, "acls.txt"))
	if err != nil {
		return err
	}
	config, err := w.config()
	if err != nil {
		return err
	}
	users, supers := map[string]string{}, []string{}
	for _, name := range w.names {
		if login := w.login(name); login != kafka.Admin {
			users[login] = password(login)
			supers = append(supers, "User:"+login)
		}
	}
	options := []kafka.Options{
		{Authorizer: true}, {}, {Authorizer: true, SuperUsers: supers},
	}
	sides := []**side{&w.direct, &w.through, &w.throughACLs}
	for i, o := range options { // one after the other: each start takes all of a small machine
		o.Version, o.Users, o.Config, o.Telemetry = w.version, users, config, true
		c, err := kafka.New(ctx, o)
		if err != nil {
			return err
		}
		w.clusters = append(w.clusters, c)
		dial := w.dialer.Dial
		if i == 0 {
			dial = dialDirect
		}
		*sides[i] = newSide(w, c.SASLAddrs()[0], dial)
		if i == 1 {
			w.plain = newSide(w, c.SASLAddrs()[0], dialDirect)
		}
		if o.Authorizer {
			if err := load(ctx, c, acls); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *world) config() (map[string]string, error) {
	var all []brokers
	if err := readStrictly(filepath.Join(worldDir, "brokers.yaml"), &all); err != nil {
		return nil, err
	}
	config := map[string]string{}
	for _, b := range all {
		suits, err := (&scenario{Kafka: b.Kafka}).suits(w.version)
		if err != nil {
			return nil, err
		}
		if suits {
			maps.Copy(config, b.Config)
			w.without = append(w.without, b.Without...)
		}
	}
	return config, nil
}

// load gives a cluster its ACLs, and waits until its broker has them.
func load(ctx context.Context, c *kafka.Cluster, acls []kmsg.CreateACLsRequestCreation) error {
	admin, err := c.Admin()
	if err != nil {
		return err
	}
	defer admin.Close()
	create := kmsg.NewPtrCreateACLsRequest()
	create.Creations = acls
	created, err := create.RequestWith(ctx, admin)
	if err != nil {
		return err
	}
	for i, r := range created.Results {
		if r.ErrorCode != 0 {
			return fmt.Errorf("create ACL %+v: %w", acls[i], kerr.ErrorForCode(r.ErrorCode))
		}
	}
	all := kmsg.NewPtrDescribeACLsRequest()
	all.ResourceType, all.ResourcePatternType = kmsg.ACLResourceTypeAny, kmsg.ACLResourcePatternTypeAny
	all.Operation, all.PermissionType = kmsg.ACLOperationAny, kmsg.ACLPermissionTypeAny
	return await(func() (bool, error) {
		described, err := all.RequestWith(ctx, admin)
		if err != nil {
			return false, err
		}
		n := 0
		for _, r := range described.Resources {
			n += len(r.ACLs)
		}
		return n == len(acls), nil
	})
}

// await asks again until it is so.
func await(is func() (bool, error)) error {
	for deadline := time.Now().Add(answerTimeout); ; time.Sleep(20 * time.Millisecond) {
		done, err := is()
		if done || err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("it is not so after %s", answerTimeout)
		}
	}
}

func (w *world) login(user string) string {
	if login := w.users[user].Login; login != "" {
		return login
	}
	return user
}

func password(login string) string {
	if login == kafka.Admin {
		return kafka.AdminPassword
	}
	return login + "-secret"
}

// mistake is a right that no ACL gives: with MUTATE=1 the suite must fail.
const mistake = `apiVersion: klamm/v1
rules: [{name: a mistake, principals: ["User:carol"], allow: [{topic: orders, operations: [Read]}]}]
`

func (w *world) startNode(ctx context.Context, klamm string, mutate bool) error {
	policies := "[acls.yaml]"
	if mutate {
		policies = "[acls.yaml, mistake.yaml]"
	}
	w.klamm = klamm
	if err := w.importACLs(); err != nil {
		return err
	}
	var err error
	if w.metrics, err = host.FreeAddr(); err != nil {
		return err
	}
	secret := filepath.Join(w.dir, "admin-password")
	login := fmt.Sprintf("{mechanism: PLAIN, username: %s, password-file: %q}", kafka.Admin, secret)
	for name, text := range map[string]string{
		"admin-password": kafka.AdminPassword, "mistake.yaml": mistake,
		"klamm.yaml": fmt.Sprintf(`node: {name: differential, cgroup: %s, pins: "", socket: ""}
intercept: {firewall: false, ports: [%d]}
clusters:
  - {name: through, bootstrap: [%q], credentials: %[4]s}
  - {name: acls, bootstrap: [%[5]q], credentials: %[4]s}
policies: %[7]s
audit: {file: audit.log}
metrics: {listen: %[6]q}
`, w.cgroup, kafka.SASLPort, w.through.addr, login, w.throughACLs.addr, w.metrics, policies),
	} {
		if err := os.WriteFile(filepath.Join(w.dir, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return w.runNode(ctx)
}

func (w *world) runNode(ctx context.Context) (err error) {
	w.node, err = host.Start(kafka.Place{Cgroup: filepath.Join(w.cgroup, "node")}, w.klamm, "node", "-c",
		filepath.Join(w.dir, "klamm.yaml"))
	if err != nil {
		return err
	}
	return host.AwaitReady(ctx, "http://"+w.metrics+"/readyz")
}

// restart lets another node go on where one ends without a word.
func (w *world) restart() error {
	err := host.EndBy(w.node.Cmd, syscall.SIGKILL)
	w.through.close()
	w.throughACLs.close()
	return errors.Join(err, w.runNode(context.Background()))
}

// buildKlamm builds the binary under test.
func buildKlamm(ctx context.Context, to string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-o", to, "klamm/cmd/klamm")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build klamm: %w\n%s", err, out)
	}
	return nil
}

// furnish learns what brokers speak and makes the topics, groups and transactions of the world.
func (w *world) furnish() error {
	versions, err := w.direct.ask(&kmsg.ApiVersionsRequest{})
	if err != nil {
		return err
	}
	for _, k := range versions.(*kmsg.ApiVersionsResponse).ApiKeys {
		if !slices.Contains(w.without, kmsg.NameForKey(k.ApiKey)) {
			w.spoken[k.ApiKey] = versionRange{k.MinVersion, k.MaxVersion}
		}
	}
	var steps []step
	if err := readStrictly(filepath.Join(worldDir, "furniture.yaml"), &steps); err != nil {
		return err
	}
	if err := nameKeys(steps, -1); err != nil {
		return err
	}
	p := &play{world: w, sides: []*side{w.direct, w.through, w.throughACLs}, user: kafka.Admin, run: "world"}
	defer p.end()
	for i := range steps {
		if !w.speaks(steps[i].key) {
			continue
		}
		steps[i].Unseen = true
		if _, err := p.step(&steps[i]); err != nil {
			return fmt.Errorf("world/furniture.yaml:%d: %w", steps[i].Request.Line, err)
		}
	}
	return nil
}

func (w *world) speaks(key int16) bool {
	_, is := w.spoken[key]
	return is && authz.Table[key].Decide != nil
}

// close ends all of it.
func (w *world) close() error {
	var all []error
	for _, s := range []*side{w.direct, w.plain, w.through, w.throughACLs} {
		if s != nil {
			s.close()
		}
	}
	if w.node != nil {
		all = append(all, host.EndBy(w.node.Cmd, syscall.SIGKILL))
	}
	for _, c := range w.clusters {
		all = append(all, c.Stop())
	}
	if w.dialer != nil {
		all = append(all, w.dialer.End())
	}
	if w.cgroup != "" {
		all = append(all, host.RemoveCgroup(w.cgroup))
	}
	return errors.Join(append(all, os.RemoveAll(w.dir))...)
}
