package node

import (
	"context"
	"errors"
	"strings"
	"time"

	"klamm/bpf"
	"klamm/enforcer"
	"klamm/enforcer/audit"
	"klamm/spiffe"
)

// watchPeriod is how long at most the redirect stays severed.
const watchPeriod = 200 * time.Millisecond

// watch puts back what somebody took away, until ctx ends.
func (n *Node) watch(ctx context.Context) {
	tick := time.NewTicker(watchPeriod)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if n.handing.Load() {
			continue
		}
		wrong, err := n.redirect.Repair()
		if len(wrong) > 0 {
			what := errors.New("the eBPF programs were severed at " + strings.Join(wrong, ", "))
			n.log.Error().Err(errors.Join(what, err)).Msg("somebody with root's rights detaches the redirect; it is put back")
			n.refuse(enforcer.Client{}, audit.Tampered, what)
		}
		if err := n.settle(); err != nil {
			n.log.Error().Err(err).Msg("ports that are no brokers' any more stay intercepted")
		}
	}
}

// kernelReasons names, for the audit, what the kernel refused by itself. What is not here the node knows of already, or
// tells itself.
var kernelReasons = map[string]audit.Reason{
	"refused_direct":        audit.Bypass,
	"refused_bind":          audit.Bypass,
	"dropped_egress":        audit.Bypass,
	"dropped_fragment":      audit.Bypass,
	"dropped_unreadable":    audit.Bypass,
	"refused_not_enrolled":  audit.NotEnrolled,
	"refused_enforcer_down": audit.EnforcerDown,
	"refused_no_socket":     audit.KernelFailed,
	"refused_no_storage":    audit.KernelFailed,
	"refused_bound_device":  audit.KernelFailed,
}

// noticed puts on record what the kernel refused, or let pass unenforced.
func (n *Node) noticed(e bpf.Event) {
	client := enforcer.Client{Destination: e.Destination()}
	client.Identity.Process = spiffe.Process{PID: e.TGID, UID: e.UID, Comm: e.Comm.String()}
	if reason, is := kernelReasons[e.Reason()]; is {
		n.refuse(client, reason, errors.New(e.Reason()))
		return
	}
	if strings.HasPrefix(e.Reason(), "passed_") {
		n.passed(client, e.Reason())
	}
}

// passed puts on record that a connection passes unseen.
func (n *Node) passed(client enforcer.Client, why string) {
	if err := n.enforcer.Unenforced(client, why); err != nil {
		n.log.Error().Err(err).Msg("a connection that passed unenforced is not on record")
	}
}

// refuse puts a refusal on record.
func (n *Node) refuse(client enforcer.Client, reason audit.Reason, cause error) {
	if err := n.enforcer.Refuse(client, reason, cause); err != nil {
		n.log.Error().Err(err).Msg("a refusal is not on record")
	}
}
