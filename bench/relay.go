package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"klamm/bpf"
)

// runRelay redirects the connects to a port from the cgroup it is in, and relays them, until standard input ends.
func runRelay(args []string) error {
	flags := flag.NewFlagSet("relay", flag.ContinueOnError)
	cgroup := flags.String("cgroup", "", "cgroup2 directory to redirect; this process is below it")
	port := flags.Uint("port", 0, "broker port")
	hash := flags.Bool("hash", false, "copy through 64 KiB buffers and hash every byte")
	if err := flags.Parse(args); err != nil {
		return err
	}
	pipe := bare
	if *hash {
		pipe = hashing
	}
	programs, err := bpf.Load(bpf.Options{CgroupPath: *cgroup})
	if err != nil {
		return err
	}
	defer func() { _ = programs.Close() }()
	stamp := func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) { err = programs.Stamp(int(fd)) }), err)
	}
	listen := net.ListenConfig{Control: stamp}
	listen.SetMultipathTCP(false)
	l, err := listen.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	own := netip.MustParseAddrPort(l.Addr().String()).Port()
	cookie, err := netnsCookie(l.(*net.TCPListener))
	if err != nil {
		return err
	}
	if err := errors.Join(programs.Enrol(cookie, own), programs.SetDestinations([]uint16{uint16(*port)}, nil),
		programs.Beat(24*time.Hour)); err != nil {
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go relay(programs, &net.Dialer{Control: stamp}, c.(*net.TCPConn), pipe)
		}
	}()
	fmt.Println("ready")
	_, err = io.Copy(io.Discard, os.Stdin)
	return errors.Join(err, l.Close())
}

func netnsCookie(l *net.TCPListener) (cookie uint64, err error) {
	raw, err := l.SyscallConn()
	if err != nil {
		return 0, err
	}
	var inner error
	err = raw.Control(func(fd uintptr) {
		cookie, inner = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	})
	return cookie, errors.Join(err, inner)
}

func relay(programs *bpf.Programs, dialer *net.Dialer, client *net.TCPConn, pipe func(dst, src *net.TCPConn) error) {
	defer func() { _ = client.Close() }()
	broker, err := dialOriginal(programs, dialer, client)
	if err != nil {
		fmt.Fprintln(os.Stderr, "relay:", err)
		return
	}
	defer func() { _ = broker.Close() }()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = errors.Join(pipe(broker, client), broker.CloseWrite()) // a reset by either side is an end like any other
	}()
	_ = errors.Join(pipe(client, broker), client.CloseWrite())
	<-done
}

func dialOriginal(programs *bpf.Programs, dialer *net.Dialer, client *net.TCPConn) (*net.TCPConn, error) {
	raw, err := client.SyscallConn()
	if err != nil {
		return nil, err
	}
	var record bpf.Record
	var inner error
	if err := raw.Control(func(fd uintptr) { record, inner = programs.Record(int(fd)) }); err != nil || inner != nil {
		return nil, errors.Join(err, inner)
	}
	c, err := dialer.Dial("tcp", record.Destination().String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// bare copies by splice(2): io.Copy between two TCP connections.
func bare(dst, src *net.TCPConn) error {
	_, err := io.Copy(dst, src)
	return err
}

func hashing(dst, src *net.TCPConn) error {
	sum, buf := sha256.New(), make([]byte, 64<<10)
	for {
		n, err := src.Read(buf)
		sum.Write(buf[:n])
		if _, werr := dst.Write(buf[:n]); werr != nil {
			return werr
		}
		if err != nil {
			return err
		}
	}
}
