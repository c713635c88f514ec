package truststore

import (
	"bytes"
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// wellKnown is where clients look unless they are told otherwise: OpenSSL and Go (Debian, Fedora, Alpine), and Java.
var wellKnown = []string{
	"/etc/ssl/certs/ca-certificates.crt",
	"/etc/pki/tls/certs/ca-bundle.crt",
	"/etc/ssl/cert.pem",
	"/etc/ssl/certs/java/cacerts",
	"/etc/pki/java/cacerts",
}

// javaOption is the JVM's option for another truststore.
const javaOption = "-Djavax.net.ssl.trustStore="

// Find lists where a process may have its truststores, as paths in its own file system: those it was told of by its
// arguments and environment first. What a Kafka client's configuration file says is not looked at.
func Find(pid int) (paths []string) {
	for _, arg := range words(pid, "cmdline") {
		if file, is := strings.CutPrefix(arg, javaOption); is {
			paths = append(paths, file)
		}
	}
	for _, variable := range words(pid, "environ") {
		switch name, value, _ := strings.Cut(variable, "="); name {
		case "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS":
			paths = append(paths, value)
		case "JAVA_HOME":
			paths = append(paths, path.Join(value, "lib/security/cacerts"))
		}
	}
	if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err == nil && path.Base(exe) == "java" {
		paths = append(paths, path.Join(path.Dir(path.Dir(exe)), "lib/security/cacerts"))
	}
	return append(paths, wellKnown...)
}

func words(pid int, file string) []string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
	if err != nil {
		return nil
	}
	return strings.Split(string(bytes.TrimSuffix(text, []byte{0})), "\x00")
}

// OpenOf opens a file as a process sees it. No link in it leads out of the process' own root. What is no regular file
// is not opened.
func OpenOf(pid int, name string) (*os.File, error) {
	root, err := unix.Open(fmt.Sprintf("/proc/%d/root", pid), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: fmt.Sprintf("/proc/%d/root", pid), Err: err}
	}
	defer func() { _ = unix.Close(root) }()
	fd, err := unix.Openat2(root, name, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	if i, err := f.Stat(); err != nil || !i.Mode().IsRegular() {
		_ = f.Close()
		return nil, &os.PathError{Op: "open", Path: name, Err: unix.EINVAL}
	}
	return f, nil
}
