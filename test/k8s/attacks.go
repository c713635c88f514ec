package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"klamm/test/kafka"
	"klamm/test/kubernetes"
)

// attack is what the root of a pod may try. Each has to work without klamm, or it would prove nothing.
type attack struct {
	name   string
	script string // {ip} and {port} are the broker's
}

const otherPort = "9999" // no port of a broker

var attacks = []attack{
	{"a plain connect", `nc -w 3 {ip} {port} </dev/null`},
	{"DNAT of loopback addresses", `
nft -f - <<End
table ip attack {
  chain out { type nat hook output priority -100; ip daddr 127.0.0.0/8 meta l4proto tcp dnat to {ip}:{port}; }
  chain post { type nat hook postrouting priority 100; masquerade; }
}
End
nc -w 3 127.0.0.1 {port} </dev/null; nc -w 3 {ip} {port} </dev/null`},
	{"a raw socket", `attack raw {ip}:{port}`},
	{"a packet socket", `attack packet {ip}:{port}`},
	{"another port, rewritten as the packet leaves the socket", `
nft -f - <<End
table ip attack {
  chain out { type filter hook output priority 0; tcp dport ` + otherPort + ` tcp dport set {port}; }
}
End
nc -w 3 {ip} ` + otherPort + ` </dev/null`},
	{"another port, rewritten as the packet leaves the device, as tc's pedit does", `
nft -f - <<End
table netdev attack {
  chain out { type filter hook egress device eth0 priority 0; tcp dport ` + otherPort + ` tcp dport set {port}; }
}
End
nc -w 3 {ip} ` + otherPort + ` </dev/null`},
}

// reach runs the attack and tells how many packets of its pod came to the broker.
func (a attack) reach(ctx context.Context, r *rig) (kubernetes.Outcome, int, error) {
	where := strings.NewReplacer("{ip}", kubernetes.BrokerIP, "{port}", strconv.Itoa(kafka.PlaintextPort))
	script := where.Replace(a.script)
	o, err := r.node.API.Run(ctx, kubernetes.Pod{Name: "attack", Image: attackImage, Root: true, Command: script})
	if err != nil {
		return o, 0, err
	}
	packets, err := r.wire.from(o.Status.PodIP)
	return o, packets, err
}

func (a attack) works(ctx context.Context, r *rig) error {
	o, packets, err := a.reach(ctx, r)
	if err == nil && packets == 0 {
		return fmt.Errorf("no packet reached the broker: %v", o)
	}
	return err
}

func (a attack) fails(ctx context.Context, r *rig) error {
	o, packets, err := a.reach(ctx, r)
	if err == nil && packets > 0 {
		return fmt.Errorf("%d packets reached the broker: %v", packets, o)
	}
	return err
}
