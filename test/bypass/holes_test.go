package bypass

import (
	"errors"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// holes: what goes around the node or lies to it, and is known to. They are tried like the others, so that what is said
// here stays true.
var holes = []vector{
	{name: "root of the host detaches the programs and removes the firewall", as: root, from: onHost, own: true,
		want: reached, attack: hostRoot,
		hole: "root of the host is trusted; what is severed is put back within a second and audited; brokers that accept" +
			" only the node's credentials"},
	{name: "packet sockets in the host's namespace", as: netRaw, from: onHost, own: true, want: reached,
		attack: byOwnAddress,
		hole: "CAP_NET_RAW in the host's namespace is as good as root of the host; brokers that accept only the node's" +
			" credentials"},
	{name: "packet sockets, with intercept.firewall off", as: podRoot, own: true, intercept: noFirewall, want: reached,
		attack: by(packetDgram), hole: "the third line is what stops them; leave it on"},
	{name: "a connected socket, taken from a process of the same user (pidfd_getfd, which asks for ptrace rights)",
		want: intercepted, attack: takesConnected,
		hole: "identity is that of the process that connected; separate users for workloads"},
}

// hostRoot does what only root can do, and connects before it is undone: the node looks every half second, so that the
// second try is in time if the first was not.
func hostRoot(a *attacker) error {
	var s unix.Stat_t
	if err := unix.Stat(a.Cgroup, &s); err != nil {
		return err
	}
	c, err := nftables.New()
	if err != nil {
		return err
	}
	c.FlushRuleset()
	err = c.Flush()
	for range 2 {
		detachLinks(s.Ino)
		err = errors.Join(err, a.plain(a.to))
	}
	return err
}

// takesConnected takes, by the right to trace it, a socket of another process of its user.
func takesConnected(a *attacker) error {
	fd, err := a.connected(a.to)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	return a.takenBy(fd, "speak by what the parent has")
}
