// Command fuzz runs every fuzz target of the module, one after the other: each for FUZZTIME (30s), on all cores. FUZZ
// is a regular expression that chooses among them, as "package Target". What a target fails on is kept in its package's
// testdata/fuzz, where go test plays it from then on.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// target is a fuzz target.
type target struct{ dir, name string }

func (t target) String() string { return t.dir + " " + t.name }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	failed, err := run(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "fuzz:", err)
	}
	if err != nil || failed > 0 {
		os.Exit(1) //nolint:gocritic // there is nothing left to stop
	}
}

func run(ctx context.Context) (failed int, err error) {
	each, err := time.ParseDuration(cmp.Or(os.Getenv("FUZZTIME"), "30s"))
	if err != nil {
		return 0, fmt.Errorf("FUZZTIME: %w", err)
	}
	chosen, err := regexp.Compile(os.Getenv("FUZZ"))
	if err != nil {
		return 0, fmt.Errorf("FUZZ: %w", err)
	}
	targets, err := find(".", chosen)
	if err != nil {
		return 0, err
	}
	if len(targets) == 0 {
		return 0, errors.New("no target is chosen")
	}
	fmt.Printf("fuzz: %d targets, %v each\n", len(targets), each)
	begun := time.Now()
	for i, t := range targets {
		fmt.Printf("[%d/%d] %s: ", i+1, len(targets), t)
		out, err := t.fuzz(ctx, each)
		if err == nil && last(out) == "" {
			err = errors.New("nothing new was tried: to play what is kept takes longer")
		}
		if err != nil && ctx.Err() != nil {
			fmt.Println("interrupted")
			return failed, ctx.Err()
		}
		if err != nil {
			failed++
			fmt.Printf("FAILED: %v\n%s\n", err, end(out))
			continue
		}
		fmt.Printf("ok, %s\n", last(out))
	}
	fmt.Printf("fuzz: %d passed, %d failed, in %v\n", len(targets)-failed, failed, time.Since(begun).Round(time.Second))
	return failed, nil
}

// find lists the targets of a module.
func find(root string, chosen *regexp.Regexp) (targets []target, err error) {
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != root && (d.Name() == "testdata" || strings.HasPrefix(d.Name(), ".") || isModule(path)):
			return fs.SkipDir
		case d.IsDir() || !strings.HasSuffix(path, "_test.go"):
			return nil
		}
		names, err := declared(path)
		for _, name := range names {
			if t := (target{"./" + filepath.Dir(path), name}); chosen.MatchString(t.String()) {
				targets = append(targets, t)
			}
		}
		return err
	})
	return targets, err
}

func isModule(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "go.mod"))
	return err == nil
}

// declared are the targets in a file.
func declared(file string) (names []string, err error) {
	parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	for _, d := range parsed.Decls {
		if f, is := d.(*ast.FuncDecl); is && f.Recv == nil && strings.HasPrefix(f.Name.Name, "Fuzz") {
			names = append(names, f.Name.Name)
		}
	}
	return names, nil
}

// mostBuild is how long it may take until a target runs, and from its last input until it has ended.
const mostBuild = 10 * time.Minute

func (t target) fuzz(ctx context.Context, each time.Duration) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, each+mostBuild)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nice", "go", "test", "-run", "^$", "-fuzz", "^"+t.name+"$",
		"-fuzztime", each.String(), "-fuzzminimizetime", "1s", "-parallel", fmt.Sprint(runtime.NumCPU()), t.dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) } // its workers with it
	cmd.WaitDelay = 10 * time.Second
	return cmd.CombinedOutput()
}

var progress = regexp.MustCompile(`execs: [1-9]\d*|new interesting: \d+ \(total: \d+\)`)

// last is what a target said at last of its progress.
func last(out []byte) string {
	found := progress.FindAllString(string(out), -1)
	return strings.Join(found[max(0, len(found)-2):], ", ")
}

// end is what an output ends with.
func end(out []byte) string {
	const lines = 60
	all := strings.Split(strings.TrimSpace(string(out)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
