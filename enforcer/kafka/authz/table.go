package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// Table is the version table: every API key a client may use through us, the versions we understand, and who decides
// it. A key without a row is hidden from ApiVersions and refused. Min follows KIP-896 (what Kafka 4 still speaks).
var Table = [kmsg.MaxKey + 1]API{}
