package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// suite is one command in a guest. What is exported goes there.
type suite struct {
	Name    string
	Dir     string
	Command []string

	pkg  string // of the tests it is; without it the command is judged by the following
	exit int
	says []string // all of it
	row  string   // what the table says when it is as it must be
}

// tests are the tests of a package that match a pattern.
func tests(name, pkg, pattern string) suite {
	s := suite{Name: name, Dir: "/src/" + pkg, pkg: pkg,
		Command: []string{"/t/" + name + ".test", "-test.v", "-test.short", "-test.timeout=20m", "-test.run=" + pattern}}
	var skip []string
	for _, e := range exceptions {
		if e.suite == name {
			skip = append(skip, e.tests)
		}
	}
	s.Command = append(s.Command, "-test.skip="+strings.Join(skip, "|"))
	return s
}

// exceptions are tests that say nothing in an emulated guest, with the reason.
var exceptions = []struct{ suite, tests, reason string }{
	{"node", "^TestAnIdempotentProducerIsTakenOverWithoutLoss$", "it takes Apache Kafka and its Java"},
	{"bypass", "^TestNoWayAroundTheNode$/^root_of_the_host_detaches",
		"a hole that the threat model names, and a race that an emulated attacker loses"},
	{"bypass", "^TestNoWayAroundTheNode$/^68,000_connects",
		"they take an emulated attacker longer than it is given; the bpf suite tests the same rule"},
}

// matching are the suites with another pattern of tests.
func matching(suites []suite, pattern string) (with []suite) {
	for _, s := range suites {
		if s.pkg != "" {
			s = tests(s.Name, s.pkg, pattern)
		}
		with = append(with, s)
	}
	return with
}

func command(name string, args ...string) suite {
	return suite{Name: name, Dir: "/tmp", Command: append([]string{"/t/klamm"}, args...)}
}

func (s suite) refused(says ...string) suite {
	s.exit, s.says, s.row = 1, says, "refused"
	return s
}

func (s suite) cell() string {
	if s.row != "" {
		return s.row
	}
	return "pass"
}

func (s suite) judge(e *ended) error {
	var errs []error
	if e.exit != s.exit {
		errs = append(errs, fmt.Errorf("it ended with exit code %d, not %d", e.exit, s.exit))
	}
	for _, text := range s.says {
		if !strings.Contains(e.output.String(), text) {
			errs = append(errs, fmt.Errorf("it does not say %q", text))
		}
	}
	if len(errs) > 0 {
		errs = append(errs, errors.New(e.output.String()))
	}
	return errors.Join(errs...)
}

// kind is one way to boot a guest.
type kind struct {
	name   string
	kernel string   // as in scripts/setup
	disk   string   // below the cache; systemd runs, and the product in it as a unit
	append []string // to the kernel's command line
	suites []suite
}

// fit is what every kernel that the product claims must pass.
var fit = []suite{
	tests("bpf", "./bpf", "."),
	tests("node", "./node", "."),
	tests("command", "./cmd/klamm", "."),
	tests("hostile", "./test/hostile", "."),
	tests("bypass", "./test/bypass", "."),
	command("doctor", "doctor"),
	command("demo", "demo"),
}

// measured are parts of the lines of suites that are shown though nothing failed.
var measured = []string{"seconds since boot", "connects, one waited", "Overall exposure level"}

// tooOld is how the product refuses a kernel, and why.
const tooOld = "older than 5.15"

// unit is for guests in which systemd runs.
var unit = []suite{tests("unit", "./test/kernels/systemd", ".")}

// disk is of Debian 12: systemd 252, and cgroup2 alone.
const disk = "systemd-guest/bookworm/disk"

var guests = []kind{
	{name: "5.10", kernel: "5.10", suites: []suite{
		command("doctor", "doctor").refused("5.15", tooOld),
		command("demo", "demo").refused(tooOld),
	}},
	{name: "6.1", kernel: "6.1", suites: fit},
	{name: "6.12", kernel: "6.12", suites: fit},
	{name: "newest", kernel: "newest", suites: fit},
	{name: "systemd", kernel: "6.1", disk: disk, suites: unit},
	{name: "lockdown", kernel: "6.1", disk: disk, append: []string{"lockdown=integrity"}, suites: unit},
}

// mutated is the one guest that boots when the product is broken on purpose, and what must notice.
var mutated = []kind{{name: "6.1", kernel: "6.1",
	suites: []suite{tests("bpf", "./bpf", "^TestEveryConnectToABrokersPortIsRedirected$")}}}

// broken: no port is a broker's.
var broken = mutation{file: "bpf/programs.go", from: "set.Anywhere[port/64] |= 1 << (port % 64)", to: "_ = port"}

// mutation is one line of the product broken on purpose.
type mutation struct{ file, from, to string }

// overlay writes the broken file and tells go build of it.
func (m mutation) overlay(dir string) (flag string, err error) {
	text, err := os.ReadFile(m.file)
	if err != nil {
		return "", err
	}
	broken := strings.Replace(string(text), m.from, m.to, 1)
	if broken == string(text) {
		return "", fmt.Errorf("%s has no %q to break", m.file, m.from)
	}
	original, err := filepath.Abs(m.file)
	if err != nil {
		return "", err
	}
	replacement := filepath.Join(dir, "broken.go")
	list, err := json.Marshal(map[string]map[string]string{"Replace": {original: replacement}})
	if err != nil {
		return "", err
	}
	file := filepath.Join(dir, "overlay.json")
	return "-overlay=" + file, errors.Join(os.WriteFile(replacement, []byte(broken), 0o600),
		os.WriteFile(file, list, 0o600))
}

// binaries are built once for all guests.
type binaries struct {
	dir   string
	flags []string // of go build
}

func (b binaries) build(ctx context.Context, name, pkg string, verb ...string) (path string, err error) {
	path = filepath.Join(b.dir, name)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	return path, goCommand(ctx, "amd64", slices.Concat(verb, b.flags, []string{"-o", path, pkg})...)
}

// prepare fills the directory that becomes the guest's root: its first process, the product, and the tests.
func (k *kind) prepare(ctx context.Context, b binaries, dir string) error {
	wanted := []struct {
		name, pkg, at string
		verb          []string
	}{
		{"guest", "./test/kernels/guest", "init", []string{"build"}},
		{"klamm", "./cmd/klamm", "t/klamm", []string{"build"}},
	}
	for _, s := range k.suites {
		if s.pkg == "" {
			continue
		}
		name := s.Name + ".test"
		wanted = append(wanted, struct {
			name, pkg, at string
			verb          []string
		}{name, s.pkg, "t/" + name, []string{"test", "-c", "-tags=guest"}})
		if err := copyTestdata(s.pkg, filepath.Join(dir, s.Dir)); err != nil {
			return err
		}
	}
	for _, w := range wanted {
		path, err := b.build(ctx, w.name, w.pkg, w.verb...)
		if err == nil {
			err = copyFile(path, filepath.Join(dir, w.at))
		}
		if err != nil {
			return err
		}
	}
	if k.disk != "" {
		if err := prepareSystemd(dir); err != nil {
			return err
		}
	}
	// Tests compare what is there with the product.
	err := os.CopyFS(filepath.Join(dir, "src/deploy"), os.DirFS("deploy"))
	return errors.Join(err, copyProgram(ctx, dir, "runc"), copyProgram(ctx, dir, "busybox"))
}

// copyTestdata makes the directory in which the tests of a package run.
func copyTestdata(pkg, to string) error {
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	data := filepath.Join(pkg, "testdata")
	if _, err := os.Stat(data); err != nil {
		return nil //nolint:nilerr // it has none
	}
	return os.CopyFS(filepath.Join(to, "testdata"), os.DirFS(data))
}

// copyProgram copies a program of this machine into /bin of the guest, and its shared libraries to where they are here.
func copyProgram(ctx context.Context, dir, name string) error {
	path, err := exec.LookPath(name)
	if err != nil {
		return fmt.Errorf("%w (scripts/setup qemu installs it)", err)
	}
	err = copyFile(path, filepath.Join(dir, "bin", name))
	// Fails for a static program, which has none.
	libraries, _ := exec.CommandContext(ctx, "ldd", path).Output()
	for _, word := range strings.Fields(string(libraries)) {
		if filepath.IsAbs(word) {
			err = errors.Join(err, copyFile(word, filepath.Join(dir, word)))
		}
	}
	return err
}

func copyFile(from, to string) error {
	text, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	info, err := os.Stat(from)
	return errors.Join(err, os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, text, info.Mode()))
}

// prepareSystemd installs the product and the checks as an administrator does, in a directory that is laid over the
// disk.
func prepareSystemd(dir string) error {
	at := func(path string) string { return filepath.Join(dir, "overlay", path) }
	for from, to := range map[string]string{
		filepath.Join(dir, "t/klamm"):         at("usr/bin/klamm"),
		filepath.Join(dir, "init"):            filepath.Join(dir, "t/guest"),
		"deploy/systemd/klamm.service":        at("etc/systemd/system/klamm.service"),
		"test/kernels/systemd/checks.service": at("etc/systemd/system/checks.service"),
		"test/kernels/systemd/klamm.yaml":     at("etc/klamm/klamm.yaml"),
		"test/kernels/systemd/policy.yaml":    at("etc/klamm/policy.yaml"),
	} {
		if err := copyFile(from, to); err != nil {
			return err
		}
	}
	for name, target := range map[string]string{"klamm.service": "basic.target", "checks.service": "multi-user.target"} {
		wants := at("etc/systemd/system/" + target + ".wants")
		if err := errors.Join(os.MkdirAll(wants, 0o755), os.Symlink("../"+name, filepath.Join(wants, name))); err != nil {
			return err
		}
	}
	return nil
}

func goCommand(ctx context.Context, arch string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+arch)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", cmd, err, out)
	}
	return nil
}
