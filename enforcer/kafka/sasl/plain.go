package sasl

import (
	"bytes"
	"unicode/utf8"
)

// plain reads RFC 4616: [authzid] NUL authcid NUL passwd. To act for another is not in Kafka: an authzid must be the
// authcid. Kafka ignores what stands behind a third NUL; RFC 4616 has none.
func plain(msg []byte) (Claim, error) {
	parts := bytes.Split(msg, []byte{0})
	if len(parts) != 3 || len(parts[1]) == 0 || len(parts[2]) == 0 || !utf8.Valid(parts[1]) {
		return Claim{}, ErrMalformed
	}
	if len(parts[0]) > 0 && !bytes.Equal(parts[0], parts[1]) {
		return Claim{}, ErrMalformed
	}
	return Claim{Principal: "User:" + string(parts[1])}, nil
}
