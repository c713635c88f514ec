package kafka

import (
	"fmt"
	"os"
	"regexp"
	"strings"
)

// Decision is one line of the authorizer's log.
type Decision struct {
	Principal string // such as User:alice
	Allowed   bool
	Operation string // such as WRITE
	Resource  string // such as Topic:LITERAL:orders
}

// As StandardAuthorizerData.buildAuditMessage writes it.
var decided = regexp.MustCompile(`kafka\.authorizer\.logger - Principal = (.*) is (Allowed|Denied) ` +
	`operation = (\S+) from host = \S+ on resource = (.*?) for `)

// Decisions are all that the brokers' authorizers have logged so far; see Options.Decisions.
func (c *Cluster) Decisions() ([]Decision, error) {
	var all []Decision
	for _, b := range c.brokers {
		text, err := os.ReadFile(b.log())
		if err != nil {
			return nil, fmt.Errorf("read the log of broker %d: %w", b.id, err)
		}
		for line := range strings.Lines(string(text)) {
			if m := decided.FindStringSubmatch(line); m != nil {
				all = append(all, Decision{m[1], m[2] == "Allowed", m[3], m[4]})
			}
		}
	}
	return all, nil
}
