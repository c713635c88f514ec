package main

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"klamm/test/kubernetes"
)

// client is one stock client. {broker}, {topic} and {group} stand for what they say.
type client struct {
	name    string
	produce string // of standard input
	consume string // of as many records as there are in {n}, in a group
	list    string
	denied  *regexp.Regexp // its own words for TOPIC_AUTHORIZATION_FAILED
}

var clients = []client{
	{
		name:    "kcat",
		produce: "kcat -P -b {broker} -t {topic}",
		consume: "kcat -b {broker} -X auto.offset.reset=earliest -c {n} -u -G {group} {topic}",
		list:    "kcat -L -b {broker}",
		denied:  regexp.MustCompile(`Topic authorization failed`),
	}, {
		name:    "franz-go",
		produce: "franz-go produce {broker} {topic}",
		consume: "franz-go consume {broker} {topic} {group} {n}",
		list:    "franz-go list {broker}",
		denied:  regexp.MustCompile(`TOPIC_AUTHORIZATION_FAILED`),
	},
}

// records is how many each client produces.
const records = 20

func (c client) run(ctx context.Context, r *rig, what, command, topic string, n int64) (kubernetes.Outcome, error) {
	command = strings.NewReplacer("{broker}", r.broker(), "{topic}", topic, "{group}", orders+"-"+c.name,
		"{n}", strconv.FormatInt(n, 10)).Replace(command)
	lines := fmt.Sprintf("seq %d | sed 's/.*/record & of %s/' | ", records, c.name)
	return r.node.API.Run(ctx, kubernetes.Pod{
		Name: clientPods + "-" + c.name + "-" + what, Command: "(" + lines + "timeout 30 " + command + ") 2>&1",
	})
}

func (c client) produces(ctx context.Context, r *rig) error {
	before, err := r.end(ctx, orders)
	if err != nil {
		return err
	}
	o, err := c.run(ctx, r, "produce", c.produce, orders, 0)
	if err != nil {
		return err
	}
	after, err := r.end(ctx, orders)
	if err == nil && (o.Code != 0 || after-before != records) {
		return fmt.Errorf("%d records are at the broker: %v", after-before, o)
	}
	return err
}

func (c client) consumes(ctx context.Context, r *rig) error {
	n, err := r.end(ctx, orders)
	if err != nil {
		return err
	}
	o, err := c.run(ctx, r, "consume", c.consume, orders, n)
	if err == nil && (o.Code != 0 || !strings.Contains(o.Log, fmt.Sprintf("record %d of %s\n", records, c.name))) {
		return fmt.Errorf("it has not got all records: %v", o)
	}
	return err
}

func (c client) seesOnlyWhatIsPermitted(ctx context.Context, r *rig) error {
	o, err := c.run(ctx, r, "list", c.list, "", 0)
	if err == nil && (!strings.Contains(o.Log, orders) || strings.Contains(o.Log, payouts)) {
		return fmt.Errorf("it sees other topics than %s: %v", orders, o)
	}
	return err
}

func (c client) isRefused(ctx context.Context, r *rig) error {
	before, err := r.end(ctx, payouts)
	if err != nil {
		return err
	}
	o, err := c.run(ctx, r, "denied", c.produce, payouts, 0)
	if err != nil {
		return err
	}
	after, err := r.end(ctx, payouts)
	if err == nil && (after != before || !c.denied.MatchString(o.Log)) {
		return fmt.Errorf("%d records are at the broker, and it did not say %q: %v", after-before, c.denied, o)
	}
	return err
}
