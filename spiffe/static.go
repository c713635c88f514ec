package spiffe

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"path"
	"regexp"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Rule gives a SPIFFE ID to the processes that match all of its selectors. At least one selector is required.
//
// Exe and ExeSHA256 say which program runs, not on whose behalf: whoever may execute a program can steer it (ptrace,
// LD_PRELOAD). Give them together with a uid, cgroup or unit where users of the host do not trust each other.
type Rule struct {
	Name     string `yaml:"name"`      // for the audit; default: the rule's place in the list
	SPIFFEID string `yaml:"spiffe-id"` // the identity given

	UID *uint32 `yaml:"uid"` // real user id on the host
	GID *uint32 `yaml:"gid"` // real group id on the host
	// Exe is the executable's absolute path, symlinks resolved. Without ExeSHA256 the process must run the file that
	// the node itself finds at that path; with it a file at that path in a container will do too: its content is
	// proven.
	Exe       string `yaml:"exe"`
	ExeSHA256 string `yaml:"exe-sha256"` // SHA-256 of the executable, 64 hex digits
	Cgroup    string `yaml:"cgroup"`     // cgroup2 path: "/a/b" is it and all below, "/a/b/*" only what is below
	Unit      string `yaml:"unit"`       // systemd unit as the system manager names it, "orders.service"

	// Kubernetes names, as this host's container runtime tells them. Where it does not the rule does not match.
	Namespace string `yaml:"namespace"`
	Pod       string `yaml:"pod"`       // needs Namespace; "orders-*" is every name that begins with "orders-"
	Container string `yaml:"container"` // needs Namespace
}

// FieldError says which field of a rule is wrong, by its YAML name, and why.
type FieldError struct {
	Field string
	Err   error
}

func (e *FieldError) Error() string { return e.Field + ": " + e.Err.Error() }

// Unwrap is the reason.
func (e *FieldError) Unwrap() error { return e.Err }

// Validate tells what is wrong with the rule, as a *FieldError, or nil.
func (r Rule) Validate() error {
	if r.UID == nil && r.GID == nil && r.Exe+r.ExeSHA256+r.Cgroup+r.Unit+r.Namespace+r.Pod+r.Container == "" {
		return &FieldError{"spiffe-id", errors.New("the rule selects every process: " +
			"give at least one of uid, gid, exe, exe-sha256, cgroup, unit, namespace")}
	}
	for _, f := range []struct {
		name, value string
		check       func(string) error
	}{
		{"spiffe-id", r.SPIFFEID, checkID},
		{"exe", r.Exe, checkAbsolute},
		{"exe-sha256", r.ExeSHA256, checkSHA256},
		{"cgroup", r.Cgroup, checkCgroup},
		{"unit", r.Unit, checkUnit},
		{"namespace", r.Namespace, checkLabel},
		{"pod", r.Pod, r.checkPod},
		{"container", r.Container, r.checkContainer},
	} {
		if f.value == "" && f.name != "spiffe-id" {
			continue
		}
		if err := f.check(f.value); err != nil {
			return &FieldError{f.name, err}
		}
	}
	return nil
}

func checkID(s string) error {
	id, err := spiffeid.FromString(s)
	if err != nil {
		return fmt.Errorf("%q is no SPIFFE ID: %w", s, err)
	}
	if id.Path() == "" {
		return fmt.Errorf("%q is a trust domain, not a workload: add a path", s)
	}
	return nil
}

func checkAbsolute(s string) error {
	if !path.IsAbs(s) || path.Clean(s) != s {
		return fmt.Errorf("%q is not an absolute, clean path like /usr/bin/orders", s)
	}
	return nil
}

func checkSHA256(s string) error {
	if b, err := hex.DecodeString(s); err != nil || len(b) != 32 {
		return fmt.Errorf("%q is not 64 hex digits, as sha256sum prints them", s)
	}
	return nil
}

func checkCgroup(s string) error {
	if s == "/" || s == "/*" {
		return fmt.Errorf("%q selects every process: name a cgroup below the root", s)
	}
	base := strings.TrimSuffix(s, "/*")
	if !path.IsAbs(base) || path.Clean(base) != base || strings.Contains(base, "*") {
		return fmt.Errorf("%q is not a cgroup2 path like /system.slice/orders.service, or one with /* at its end", s)
	}
	return nil
}

func checkUnit(s string) error {
	if unitOf("/"+s) != s {
		return fmt.Errorf("%q is not a unit with processes: "+
			"its name ends in .service, .scope, .socket, .mount or .swap", s)
	}
	return nil
}

var (
	label     = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	subdomain = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)
	prefix    = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{0,252}\*$`)
)

// checkLabel: names of namespaces and containers are RFC 1123 labels.
func checkLabel(s string) error {
	if !label.MatchString(s) {
		return fmt.Errorf("%q is not a name in Kubernetes: want up to 63 of a-z, 0-9 and dashes", s)
	}
	return nil
}

// checkPod: names of pods are RFC 1123 subdomains.
func (r Rule) checkPod(s string) error {
	if !subdomain.MatchString(s) && !prefix.MatchString(s) {
		return fmt.Errorf("%q is not a pod's name, or the beginning of one with * at its end", s)
	}
	return r.checkNamespaced()
}

func (r Rule) checkContainer(s string) error { return cmp.Or(checkLabel(s), r.checkNamespaced()) }

func (r Rule) checkNamespaced() error {
	if r.Namespace == "" {
		return errors.New("give namespace as well: in another one the same name may be anybody's choice")
	}
	return nil
}

// Static attests processes by a fixed list of rules. Safe for concurrent use.
type Static struct {
	rules     []compiled
	processes *Processes
}

type compiled struct {
	Rule
	id spiffeid.ID
}

// NewStatic attests by rules, of which the first that matches wins, processes that processes verifies.
func NewStatic(rules []Rule, processes *Processes) (*Static, error) {
	s := &Static{processes: processes}
	for i, r := range rules {
		if err := r.Validate(); err != nil {
			return nil, fmt.Errorf("identities[%d]: %w", i, err)
		}
		if r.Name == "" {
			r.Name = fmt.Sprintf("identities[%d]", i)
		}
		r.ExeSHA256 = strings.ToLower(r.ExeSHA256)
		s.rules = append(s.rules, compiled{r, spiffeid.RequireFromString(r.SPIFFEID)})
	}
	return s, nil
}

// Name is SourceStatic.
func (s *Static) Name() string { return SourceStatic }

// watch tells the identity of the first rule that matches. None of what rules select changes while a program runs.
func (s *Static) watch(ctx context.Context, p subject, tell func(*Evidence, error)) error {
	sum := ""
	for _, r := range s.rules {
		if !r.matches(p.process) {
			continue
		}
		if r.ExeSHA256 != "" && sum == "" {
			var err error
			if sum, err = s.processes.sha256(ctx, p.peer); err != nil {
				return err
			}
		}
		if r.ExeSHA256 == "" || r.ExeSHA256 == sum {
			tell(&Evidence{Source: SourceStatic, ID: r.id, Rule: r.Name, exeSHA256: sum}, nil)
			return nil
		}
	}
	tell(nil, nil)
	return nil
}

// matches compares all selectors but the hash, which is not known before it is needed.
func (r Rule) matches(p process) bool {
	return (r.UID == nil || *r.UID == p.UID) &&
		(r.GID == nil || *r.GID == p.GID) &&
		(r.Exe == "" || r.Exe == p.Exe && (p.exeOnHost || r.ExeSHA256 != "")) &&
		(r.Cgroup == "" || cgroupMatches(r.Cgroup, p.Cgroup)) &&
		(r.Unit == "" || r.Unit == p.Unit) &&
		(r.Namespace == "" || r.Namespace == p.Namespace) &&
		(r.Pod == "" || podMatches(r.Pod, p.Pod)) &&
		(r.Container == "" || r.Container == p.Container)
}

func podMatches(pattern, pod string) bool {
	begin, more := strings.CutSuffix(pattern, "*")
	return pod == pattern || more && strings.HasPrefix(pod, begin)
}

func cgroupMatches(pattern, cgroup string) bool {
	base, below := strings.CutSuffix(pattern, "/*")
	return strings.HasPrefix(cgroup, base+"/") || !below && cgroup == base
}
