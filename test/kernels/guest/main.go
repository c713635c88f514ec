// Guest is the first process of a virtual machine that make verify-kernels boots: it makes the machine as the product
// expects one, runs the suites it was given, writes what they say to the port named results, and powers off.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Suite is one command to run. Its name must have no spaces.
type Suite struct {
	Name    string
	Dir     string
	Command []string
}

// suitesFile lists the suites of this boot.
const suitesFile = "/suites.json"

func main() {
	if os.Getpid() != 1 {
		if err := work(); err != nil {
			fmt.Fprintln(os.Stderr, "guest:", err)
			os.Exit(1)
		}
		return
	}
	if err := begin(); err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// diskVariable names the device of a root file system, on which systemd becomes the first process.
const diskVariable = "KLAMM_DISK"

// begin starts the worker and, as any first process must, waits for whoever has lost its parent meanwhile.
func begin() error {
	if err := setUp(); err != nil {
		return err
	}
	if disk := os.Getenv(diskVariable); disk != "" {
		return goOnFrom(disk)
	}
	worker, err := os.StartProcess("/proc/self/exe", []string{"guest"},
		&os.ProcAttr{Env: os.Environ(), Files: []*os.File{nil, os.Stdout, os.Stderr}})
	if err != nil {
		return err
	}
	for {
		switch pid, err := unix.Wait4(-1, nil, 0, nil); {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case pid == worker.Pid:
			return nil
		}
	}
}

var mounts = []struct{ kind, at string }{
	{"proc", "/proc"},
	{"sysfs", "/sys"},
	{"devtmpfs", "/dev"},
	{"tmpfs", "/tmp"},
	{"tmpfs", "/run"},
	{"cgroup2", "/sys/fs/cgroup"},
	{"bpf", "/sys/fs/bpf"},
}

func setUp() error {
	// What the kernel unpacks its files to is no mount that pivot_root(2), as container runtimes call it, can leave.
	if err := errors.Join(os.Mkdir("/newroot", 0o755), unix.Mount("/", "/newroot", "", unix.MS_BIND, ""),
		enter("/newroot")); err != nil {
		return err
	}
	for _, m := range mounts {
		if err := errors.Join(os.MkdirAll(m.at, 0o755), unix.Mount(m.kind, m.at, m.kind, 0, "")); err != nil {
			return fmt.Errorf("mount %s at %s: %w", m.kind, m.at, err)
		}
	}
	for name, text := range map[string]string{
		"/etc/hosts":  "127.0.0.1 localhost\n::1 localhost\n",
		"/etc/passwd": "root:x:0:0::/root:/bin/sh\n",
	} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755),
			os.WriteFile(name, []byte(text), 0o600), os.Chmod(name, 0o644)); err != nil {
			return err
		}
	}
	var err error
	for _, dir := range []string{"/sbin", "/usr/bin", "/usr/sbin"} {
		err = errors.Join(err, os.MkdirAll(dir, 0o755))
	}
	// The kernel itself calls /sbin/modprobe for all else that it lacks. Without a service manager a process may open
	// 4096 files at most.
	const files = 1 << 20
	return errors.Join(err, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: files, Max: files}),
		os.Chmod("/tmp", 0o777|os.ModeSticky),
		os.Setenv("PATH", "/bin:/sbin:/usr/bin:/usr/sbin:/t"), os.Setenv("HOME", "/tmp"),
		call("--install", "-s"), call("ip", "link", "set", "lo", "up"),
		modprobe("virtio_pci"), modprobe("virtio_console"),
		modprobe("br_netfilter")) // as on every host of containers
}

// enter makes a mount point the root.
func enter(root string) error {
	return errors.Join(os.Chdir(root), unix.Mount(".", "/", "", unix.MS_MOVE, ""), unix.Chroot("."), os.Chdir("/"))
}

// modprobe loads a module, if it is one in this kernel: others are built in.
func modprobe(name string) error {
	if there := call("modprobe", "-D", name) == nil; there {
		return call("modprobe", name)
	}
	return nil
}

// overlay is laid over the root file system of the disk.
const overlay = "/overlay"

// goOnFrom makes the disk the root, with all that is here but the mounts, which systemd makes itself, and gives way to
// what is /sbin/init there. It returns only if that fails.
func goOnFrom(disk string) error {
	const root = "/disk"
	err := errors.Join(
		modprobe("virtio_blk"), modprobe("ext4"), os.Mkdir(root, 0o755),
		unix.Mount(disk, root, "ext4", 0, ""),
		call("cp", "-a", overlay+"/.", root), call("cp", "-a", "/t", "/src", suitesFile, root),
		os.MkdirAll(root+"/lib/modules", 0o755),
		unix.Mount("/lib/modules", root+"/lib/modules", "", unix.MS_BIND, ""))
	for _, m := range slices.Backward(mounts) {
		err = errors.Join(err, unix.Unmount(m.at, 0))
	}
	if err := errors.Join(err, enter(root)); err != nil {
		return err
	}
	return unix.Exec("/sbin/init", []string{"/sbin/init"}, []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"})
}

// call runs a command of busybox.
func call(args ...string) error {
	out, err := exec.Command("/bin/busybox", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%v: %w\n%s", args, err, out)
	}
	return nil
}

func work() error {
	results, err := openPort("results")
	if err != nil {
		return err
	}
	defer func() { _ = results.Close() }()
	text, err := os.ReadFile(suitesFile)
	if err != nil {
		return err
	}
	var suites []Suite
	if err := json.Unmarshal(text, &suites); err != nil {
		return err
	}
	for _, s := range suites {
		if err := run(s, results); err != nil {
			return err
		}
	}
	_, err = fmt.Fprintln(results, "@done")
	return err
}

// run has the suite write between two lines of ours, and unbuffered, so that nothing is lost if the kernel panics.
func run(s Suite, results *os.File) error {
	began := time.Now()
	if _, err := fmt.Fprintln(results, "@begin", s.Name); err != nil {
		return err
	}
	cmd := exec.Command(s.Command[0], s.Command[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.Dir, results, results
	if err := cmd.Run(); err != nil {
		_, _ = fmt.Fprintln(results, s.Command, err) // and told by the exit code
	}
	_, err := fmt.Fprintf(results, "\n@end %s %d %.1fs\n", s.Name, cmd.ProcessState.ExitCode(),
		time.Since(began).Seconds())
	return err
}

// openPort opens a port of a virtio console by the name that qemu gave it.
func openPort(name string) (*os.File, error) {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return nil, err
	}
	for _, file := range names {
		if text, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(text)) == name {
			return os.OpenFile(filepath.Join("/dev", filepath.Base(filepath.Dir(file))), os.O_WRONLY, 0)
		}
	}
	return nil, fmt.Errorf("there is no port %q among %v", name, names)
}
