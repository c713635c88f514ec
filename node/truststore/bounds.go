package truststore

import (
	"errors"
	"math/big"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

// Stores are workloads' files, and the libraries that read them believe what they declare: the length of an entry is
// allocated before it is read, and a key is derived in as many rounds as it says. So what a store declares is looked at
// first.

// mostRounds are those of all key derivations of a store together, some seconds of them. Java writes 10,000 in each,
// and reads up to 5 million.
const mostRounds = 2_000_000

var (
	errJKS    = errors.New("it is cut short, or no JKS store")
	errRounds = errors.New("to open it takes more than 2 million rounds of key derivation")
)

// Tags of entries in a JKS store.
const (
	jksKey     = 1
	jksTrusted = 2
)

// boundJKS tells whether all that a JKS store declares is there.
func boundJKS(data []byte) error {
	s := cryptobyte.String(data)
	var version, entries uint32
	if !s.Skip(len(magicJKS)) || !s.ReadUint32(&version) || !s.ReadUint32(&entries) {
		return errJKS
	}
	for ; entries > 0; entries-- {
		var tag, chain uint32
		var alias, key cryptobyte.String
		const created = 8
		if !s.ReadUint32(&tag) || !s.ReadUint16LengthPrefixed(&alias) || !s.Skip(created) {
			return errJKS
		}
		switch tag {
		case jksKey:
			if !readUint32LengthPrefixed(&s, &key) || !s.ReadUint32(&chain) {
				return errJKS
			}
		case jksTrusted:
			chain = 1
		default:
			return errJKS
		}
		if int64(chain) > int64(len(s)) {
			return errJKS
		}
		for ; chain > 0; chain-- {
			var kind, certificate cryptobyte.String
			if version == 2 && !s.ReadUint16LengthPrefixed(&kind) || !readUint32LengthPrefixed(&s, &certificate) {
				return errJKS
			}
		}
	}
	return nil
}

func readUint32LengthPrefixed(s, out *cryptobyte.String) bool {
	var n uint32
	return s.ReadUint32(&n) && int64(n) <= int64(len(*s)) && s.ReadBytes((*[]byte)(out), int(n))
}

// boundPKCS12 tells whether the key derivations of a PKCS #12 store (RFC 7292) end in time: a salt is an OCTET STRING
// and the rounds are the INTEGER after it, in MacData, in pkcs-12PbeParams and in PBKDF2-params (RFC 8018) alike.
func boundPKCS12(der []byte) error {
	const deepest = 32
	left := int64(mostRounds)
	if !countRounds(cryptobyte.String(der), &left, deepest) {
		return errRounds
	}
	return nil
}

// countRounds takes what it finds off left, and tells whether it sufficed. What is no DER is not looked at: the library
// does not read it either.
func countRounds(s cryptobyte.String, left *int64, depth int) bool {
	salted := false
	for depth > 0 && !s.Empty() {
		var tag asn1.Tag
		var element, content cryptobyte.String
		if !s.ReadAnyASN1Element(&element, &tag) {
			return true
		}
		whole := element
		if !element.ReadAnyASN1(&content, &tag) {
			return true
		}
		switch {
		case tag == asn1.INTEGER && salted:
			rounds := new(big.Int)
			if whole.ReadASN1Integer(rounds) && rounds.Sign() > 0 {
				if !rounds.IsInt64() || rounds.Int64() > *left {
					return false
				}
				*left -= rounds.Int64()
			}
		case tag == asn1.OCTET_STRING || tag&constructed != 0:
			if !countRounds(content, left, depth-1) {
				return false
			}
		}
		salted = tag == asn1.OCTET_STRING
	}
	return true
}

// constructed is the bit of a tag that says that elements follow (X.690, section 8.1.2.5).
const constructed = 0x20
