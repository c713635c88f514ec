package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// bootTimeout bounds one guest.
const bootTimeout = 40 * time.Minute

// guest is one virtual machine.
type guest struct {
	kernel string   // directory of vmlinuz and lib/modules
	files  string   // directory that becomes the root file system, or is laid over that of disk
	disk   string   // image of a root file system; without it files is all there is
	log    string   // file for what the kernel says
	append []string // to the kernel's command line; NAME=value is an environment variable of the first process
	note   func(suite, test, end string)
}

// ended is how a suite ended. Tests are counted by how they ended: pass, fail or skip.
type ended struct {
	tests  map[string]string // by name; subtests are tests of their own
	output strings.Builder
	exit   int
	took   string
}

// boot runs the suites in a guest. That some fail is a result and no error; where there is one, the results are those
// until then.
func (g *guest) boot(ctx context.Context, suites []suite) (_ map[string]*ended, err error) {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	initrd, err := g.initrd(ctx, suites)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.Remove(initrd)) }()

	// Emulated, because a host may be a virtual machine itself, in which /dev/kvm is not there or not whole. By one
	// thread: with one for each CPU a kernel that patches its own code may end in "Oops: int3".
	args := []string{"-accel", "tcg,thread=single", "-cpu", "max", "-smp", "2", "-m", "3072", "-no-reboot",
		"-nodefaults", "-no-user-config", "-display", "none",
		"-kernel", filepath.Join(g.kernel, "vmlinuz"), "-initrd", initrd,
		"-append", strings.Join(append([]string{"console=ttyS0 panic=-1"}, g.append...), " "),
		"-serial", "file:" + g.log,
		"-device", "virtio-serial-pci", "-chardev", "file,id=results,path=/dev/stdout",
		"-device", "virtserialport,chardev=results,name=results"}
	if g.disk != "" {
		args = append(args, "-drive", "if=virtio,format=raw,snapshot=on,file="+g.disk)
	}
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	results, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ends, done, err := g.read(results)
	if waitErr := cmd.Wait(); err == nil {
		err = waitErr
	}
	if err == nil && !done {
		err = errors.New("it ended before its suites did")
	}
	if err != nil {
		err = fmt.Errorf("the guest: %w\n%s%s", errors.Join(ctx.Err(), err), stderr.String(), g.lastWords())
	}
	return ends, err
}

// initrd joins the files, the suites and the kernel's modules to what the kernel unpacks at its start.
func (g *guest) initrd(ctx context.Context, suites []suite) (_ string, err error) {
	text, err := json.Marshal(suites)
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(g.files, "suites.json"), text, 0o600); err != nil {
		return "", err
	}
	out, err := os.CreateTemp("", "klamm-initrd-")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	for _, part := range []struct{ dir, list string }{{g.files, "."}, {g.kernel, "lib"}} {
		cmd := exec.CommandContext(ctx, "sh", "-c", "find "+part.list+" | cpio -o -H newc -R 0:0 --quiet")
		cmd.Dir, cmd.Stdout, cmd.Stderr = part.dir, out, os.Stderr
		if err := cmd.Run(); err != nil {
			return "", fmt.Errorf("pack %s: %w", part.dir, err)
		}
	}
	return out.Name(), nil
}

// Lines of the guest's own, and how go test tells about a test. That may follow output without an end of line.
var (
	beginLine = regexp.MustCompile(`^@begin (\S+)$`)
	endLine   = regexp.MustCompile(`^@end (\S+) (-?\d+) (\S+)$`)
	testBegun = regexp.MustCompile(`=== RUN   (\S+)$`)
	testEnded = regexp.MustCompile(`--- (PASS|FAIL|SKIP): (\S+) \(\d+\.\d+s\)$`)
)

func (g *guest) read(results io.Reader) (ends map[string]*ended, done bool, err error) {
	ends = map[string]*ended{}
	current := &ended{}
	name := ""
	lines := bufio.NewScanner(results)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := lines.Text()
		if line == "@done" {
			done = true
		} else if m := beginLine.FindStringSubmatch(line); m != nil {
			name = m[1]
			current = &ended{tests: map[string]string{}}
			ends[name] = current
		} else if m := endLine.FindStringSubmatch(line); m != nil {
			if current.exit, err = strconv.Atoi(m[2]); err != nil {
				return nil, false, err
			}
			current.took = m[3]
		} else if m := testBegun.FindStringSubmatch(line); m != nil {
			current.tests[m[1]] = "unfinished" // of a run that panicked or was out of time
		} else if m := testEnded.FindStringSubmatch(line); m != nil {
			current.tests[m[2]] = strings.ToLower(m[1])
			g.note(name, m[2], strings.ToLower(m[1]))
		}
		current.output.WriteString(line + "\n")
	}
	return ends, done, lines.Err()
}

// lastWords is the end of what the kernel said.
func (g *guest) lastWords() string {
	text, err := os.ReadFile(g.log)
	if err != nil {
		return err.Error()
	}
	const enough = 4096
	return string(text[max(0, len(text)-enough):])
}
