package authz

import (
	"fmt"
	"slices"
	"strings"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// configChange is what AlterConfigs and IncrementalAlterConfigs ask for one resource.
type configChange struct {
	kind     kmsg.ConfigResourceType
	name     string
	settings []string
	unset    []string // settings that should have a value, and have null
}

func (change *configChange) add(setting string, value *string, needsValue bool) {
	change.settings = append(change.settings, setting)
	if needsValue && value == nil {
		change.unset = append(change.unset, setting)
	}
}

// configRefusal is the answer to a change that the broker is not asked.
type configRefusal struct {
	err *kerr.Error
	msg *string
}

// invalid is what Kafka's ConfigAdminManager.preprocess finds wrong with a change; empty: nothing.
func (change *configChange) invalid(twice, known bool) string {
	settings := slices.Clone(change.settings)
	slices.Sort(settings)
	switch {
	case twice:
		return "Each resource must appear at most once."
	case len(slices.Compact(settings)) < len(change.settings):
		return "Error due to duplicate config keys"
	case len(change.unset) > 0:
		return "Null value not supported for : " + strings.Join(change.unset, ", ")
	case !known:
		return fmt.Sprintf("Unknown resource type %d", change.kind)
	default:
		return ""
	}
}

// refuseChanges tells how each change is refused; nil where the broker is to be asked. What is invalid whoever asks
// comes before the rights, as in Kafka's ConfigAdminManager.preprocess. A broker says of what it may refuse itself,
// without the controller, no more than the code; that are its own configs and log levels.
func (c *Ctx) refuseChanges(changes []configChange, rights map[kmsg.ConfigResourceType]configRight) []*configRefusal {
	type resource struct {
		kind kmsg.ConfigResourceType
		name string
	}
	times := make(map[resource]int, len(changes))
	for _, change := range changes {
		times[resource{change.kind, change.name}]++
	}
	refusals := make([]*configRefusal, len(changes))
	for i, change := range changes {
		right, known := rights[change.kind]
		if known && c.allowConfig(right, change.name, kmsg.ACLOperationAlterConfigs) {
			continue
		}
		invalid := change.invalid(times[resource{change.kind, change.name}] > 1, known)
		switch {
		case invalid != "":
			refusals[i] = &configRefusal{kerr.InvalidRequest, &invalid}
		case change.kind == kmsg.ConfigResourceTypeBroker || change.kind == kmsg.ConfigResourceTypeBrokerLogger:
			refusals[i] = &configRefusal{right.err, nil}
		default:
			refusals[i] = &configRefusal{right.err, &right.msg}
		}
	}
	return refusals
}
